"""From checkpoint to answer: converts the embedded checkpoint, asks it, and lets it tap.

    python examples/demo.py

GGUF files and drawings go to out/. `make demo` runs it.
"""

from pathlib import Path

from autoglm_gguf import AutoGLM, convert
from autoglm_gguf.annotate import annotate
from autoglm_gguf.cli.output import ProgressLine, dim
from autoglm_gguf.evaluate.screens import draw_screen, held_out_tasks
from autoglm_gguf.hub import embedded_checkpoint
from autoglm_gguf.units import format_bytes

OUT = Path("out")


def main() -> None:
    checkpoint = embedded_checkpoint()
    for outtype in ("q8_0", "q4_0"):
        print(f"\n$ autoglm-gguf convert {checkpoint.name} --outtype {outtype} --outdir {OUT}")
        pair = convert(checkpoint, OUT, outtype, on_progress=ProgressLine())
        for path in filter(None, (pair.text, pair.mmproj)):
            print(f"{format_bytes(path.stat().st_size):>10}  {path}")

    pair = convert(checkpoint, OUT, "q8_0")
    with AutoGLM.load(pair.text, mmproj=pair.mmproj, n_ctx=4096) as model:
        for instruction in ("打开微信", "Open Chrome for me"):
            print(f"\n> {instruction}")
            for chunk in model.stream(instruction, max_tokens=128):
                print(chunk.text, end="", flush=True)
            if chunk.usage and chunk.timings:
                speed = f"{chunk.timings.predicted_per_second:.0f} tok/s"
                print(dim(f"\n[{chunk.usage.completion_tokens} tokens, {speed}]"))

        for number, task in enumerate(held_out_tasks(6)[-2:], 1):
            screen, path = draw_screen(task.screen), OUT / f"tap-{number}.png"
            print(f"\n> act: {task.text!r} on a screen it has never seen")
            step = model.act(task.text, screen)
            print(f"thinking: {step.thinking}\naction:   {step.action.render()}")
            annotate(screen, step.action).save(path)
            ms = step.timings.ttft_ms
            print(f"drawn:    {path}")
            print(dim(f"[{step.usage.image_tokens} image tokens, first token after {ms:.0f} ms]"))


if __name__ == "__main__":
    main()
