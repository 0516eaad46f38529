"""The real engine on a small random model: what it generates, refuses and completes."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import EOS, Shape, build_checkpoint, rewrite_gguf, token_ids
from PIL import Image

from autoglm_gguf import (
    AutoGLM,
    ContextFullError,
    EngineError,
    GGUFError,
    ImageError,
    PairMismatchError,
    PromptError,
    convert,
)
from autoglm_gguf.config import ContextParams
from autoglm_gguf.engine.llama import LlamaEngine

pytestmark = pytest.mark.native

IMAGE = {"type": "image", "image": "x.png"}
UPSTREAM_LACKS = ("autoglm.", "tokenizer.ggml.eom_token_id", "clip.vision.spatial_merge_size")


def load(pair: tuple[Path, Path], **options: object) -> AutoGLM:
    return AutoGLM.load(pair[0], mmproj=pair[1], **{"n_ctx": 512, **options})


def test_greedy_answers_repeat(random_pair: tuple[Path, Path]) -> None:
    with load(random_pair) as model:
        first = model.generate("hello", max_tokens=24)
        second = model.generate("hello", max_tokens=24)
    assert first.tokens == second.tokens
    assert first.usage.completion_tokens == len(first.tokens) <= 24


def test_seed_reproduces_sampled_answers(random_pair: tuple[Path, Path]) -> None:
    sampling = {"max_tokens": 24, "temperature": 1.5, "top_p": 0.95, "top_k": 50, "min_p": 0.01}
    with load(random_pair) as model:
        answers = [model.generate("hello", seed=seed, **sampling).tokens for seed in (1, 1, 2)]
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_penalties_count_generated_tokens_only(random_pair: tuple[Path, Path]) -> None:
    """The prompt repeats one letter; a prompt-counting penalty would change the first token."""
    with load(random_pair) as model:
        prompt = "a" * 40
        plain = model.generate(prompt, raw=True, max_tokens=16)
        punished = model.generate(prompt, raw=True, max_tokens=16, frequency_penalty=2.0)
    assert plain.tokens[0] == punished.tokens[0]
    assert len(set(punished.tokens)) > len(set(plain.tokens))


@pytest.mark.parametrize(
    "penalties",
    [
        {},
        {"frequency_penalty": 0.2},
        {"frequency_penalty": 0.1, "presence_penalty": 0.4, "repeat_penalty": 1.2},
    ],
)
def test_greedy_choices_are_those_computed_from_the_logits(
    random_pair: tuple[Path, Path], penalties: dict[str, float]
) -> None:
    """130 tokens, each the best after penalties over all generated before it, none of the prompt.

    Greedy whatever the filters say.
    """
    frequency, presence, repeat = (
        penalties.get(f"{name}_penalty", default)
        for name, default in (("frequency", 0.0), ("presence", 0.0), ("repeat", 1.0))
    )
    prompt = "hello hello in the end"
    engine = LlamaEngine(random_pair[0], None, ContextParams(n_ctx=256, n_threads=1))
    # A random model would end soon.
    engine._info = replace(engine.info, stop_ids=frozenset(), stop_strings=())
    filters = {"top_p": 0.3, "top_k": 7, "min_p": 0.9, "seed": 5}
    n_beyond = n_moved = 0
    with AutoGLM(engine) as model:
        answer = model.generate(prompt, raw=True, max_tokens=130, **penalties, **filters)
        engine.keep(0)
        engine.eval_tokens(engine.tokenize(prompt))
        for n, token in enumerate(answer.tokens):
            logits = engine.logits().astype(np.float64)
            expected = logits.copy()
            for said in set(answer.tokens[:n]):
                count = answer.tokens[:n].count(said)
                value = logits[said] * repeat if logits[said] < 0 else logits[said] / repeat
                expected[said] = value - frequency * count - presence
                n_beyond += n > 64 and said not in answer.tokens[n - 64 : n]
            assert expected[token] >= expected.max() - 1e-4
            n_moved += token != int(logits.argmax())
            engine.eval_tokens([token])
    assert len(answer.tokens) == 130
    assert bool(n_moved) == bool(penalties)
    assert n_beyond or not penalties, "some penalties are for tokens more than 64 back"


@pytest.mark.parametrize("sampling", [{"temperature": 1.3, "top_p": 0.9}, {"temperature": 0.8}])
def test_seed_reproduces_an_answer_whatever_the_kv_cache_held(
    random_pair: tuple[Path, Path], sampling: dict[str, float]
) -> None:
    options = {"raw": True, "max_tokens": 16, "seed": 9, "frequency_penalty": 0.3, **sampling}
    with load(random_pair) as model:
        first = model.generate("hello in the", **options)
        again = model.generate("hello in the", **options)
        model.generate("hello there", raw=True, max_tokens=3)
        partly = model.generate("hello in the", **options)
        anew = model.generate("hello in the", cache_prompt=False, **options)
    with load(random_pair) as model:
        fresh = model.generate("hello in the", **options)
    assert again.timings.cache_n > partly.timings.cache_n > anew.timings.cache_n == 0
    assert {first.tokens, again.tokens, partly.tokens, anew.tokens, fresh.tokens} == {first.tokens}


def test_every_eos_id_ends_the_turn(random_pair: tuple[Path, Path]) -> None:
    ids = token_ids()
    with load(random_pair) as model:
        assert model.info.stop_ids == {ids[token] for token in EOS}


def test_image_is_seen(random_pair: tuple[Path, Path]) -> None:
    with load(random_pair) as model:
        red = model.generate("hello", image=Image.new("RGB", (112, 140), "red"), max_tokens=8)
        noise = np.random.default_rng(0).integers(0, 256, (140, 112, 3), np.uint8)
        other = model.generate("hello", image=Image.fromarray(noise), max_tokens=8)
    assert red.usage.image_tokens == other.usage.image_tokens == 20
    # [gMASK] <sop> <|user|> LF, begin, 20, end, hello, <|assistant|> LF
    assert red.usage.prompt_tokens == 4 + 1 + 20 + 1 + 1 + 2
    assert red.tokens != other.tokens
    assert red.timings.image_ms > 0


def test_max_image_tokens_bounds_an_image(random_pair: tuple[Path, Path]) -> None:
    with load(random_pair, max_image_tokens=30) as model:
        answer = model.generate("hello", image=Image.new("RGB", (1080, 2400)), max_tokens=1)
    assert 16 <= answer.usage.image_tokens <= 30


def test_image_that_no_limit_makes_short_is_seen_after_others(
    tiny_pair: Callable[[str], tuple[Path, Path]],
) -> None:
    long = Image.linear_gradient("L").resize((28, 5600))  # 1 x 120 tokens; autoglm-tiny has 72
    answers = []
    for before in ([], [Image.new("RGB", (112, 112))]):
        with load(tiny_pair("q8_0"), n_threads=1) as model:
            for image in (*before, long):
                answer = model.generate("hello", image=image, max_tokens=8)
            answers.append((answer.usage.image_tokens, answer.text))
    assert answers[0] == answers[1]
    assert answers[0][0] == 120


def test_several_images_keep_their_places(random_pair: tuple[Path, Path]) -> None:
    first, second = Image.new("RGB", (112, 112), "red"), Image.new("RGB", (140, 112), "blue")
    content = [
        {"type": "image", "image": first},
        {"type": "text", "text": "then"},
        {"type": "image", "image": second},
        {"type": "text", "text": "hello"},
    ]
    swapped = [content[2], content[1], content[0], content[3]]
    with load(random_pair) as model:
        one = model.generate([{"role": "user", "content": content}], max_tokens=8)
        two = model.generate([{"role": "user", "content": swapped}], max_tokens=8)
    assert one.usage.image_tokens == two.usage.image_tokens == 16 + 20
    assert one.tokens != two.tokens


def test_image_is_refused_when_model_is_text_only(random_pair: tuple[Path, Path]) -> None:
    with (
        AutoGLM.load(random_pair[0], mmproj=None, n_ctx=512) as model,
        pytest.raises(ImageError, match="takes no images") as caught,
    ):
        model.generate("hello", image=Image.new("RGB", (112, 112)))
    assert "mmproj" in caught.value.hint


def test_image_is_refused_when_rope_sections_are_missing(
    random_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """llama.cpp would end the process over this request."""
    old = rewrite_gguf(random_pair[0], tmp_path / "old.gguf", drop=("glm4.rope.dim",))
    with load((old, random_pair[1])) as model:
        with pytest.raises(ImageError, match=r"rope\.dimension_sections"):
            model.generate("hello", image=Image.new("RGB", (112, 112)))
        assert model.generate("hello", max_tokens=4).tokens


def test_pair_without_our_keys_is_completed_with_reasons(
    random_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """What upstream's converter writes: one eos, one eot, no image limits."""
    ids = token_ids()
    text = rewrite_gguf(
        random_pair[0],
        tmp_path / "up.gguf",
        drop=UPSTREAM_LACKS,
        tokenizer__ggml__eos_token_id=ids["<|endoftext|>"],
        tokenizer__ggml__eot_token_id=ids["<|user|>"],
    )
    tower = rewrite_gguf(random_pair[1], tmp_path / "mmproj-up.gguf", drop=UPSTREAM_LACKS)
    with load((text, tower)) as model:
        assert model.info.stop_ids == {ids[token] for token in EOS}
        assert any("</answer>" in note and "eos list" in note for note in model.info.notes)
        assert any(note.startswith("image limits") for note in model.info.notes)
        image = Image.new("RGB", (112, 112), "red")
        with load(random_pair) as ours:
            expected = ours.generate("hello", image=image, max_tokens=8)
        assert model.generate("hello", image=image, max_tokens=8).tokens == expected.tokens


def test_template_is_completed_from_token_names(
    random_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    bare = rewrite_gguf(random_pair[0], tmp_path / "bare.gguf", drop=("tokenizer.chat_template",))
    with load((bare, random_pair[1])) as model, load(random_pair) as whole:
        assert any(note.startswith("chat template: GLM") for note in model.info.notes)
        messages = [
            {"role": "system", "content": "S"},
            {
                "role": "user",
                "content": [{"type": "image", "image": "x"}, {"type": "text", "text": "t"}],
            },
        ]
        assert model.render(messages).text == whole.render(messages).text


def test_plain_text_is_completed_when_there_is_no_template(
    random_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    import gguf

    tokens = gguf.GGUFReader(random_pair[0]).fields["tokenizer.ggml.tokens"].contents()
    renamed = [t.replace("|user|", "|u|").replace("</answer>", "</a>") for t in tokens]
    bare = rewrite_gguf(
        random_pair[0],
        tmp_path / "bare.gguf",
        drop=("tokenizer.chat_template",),
        tokenizer__ggml__tokens=renamed,
    )
    with load((bare, random_pair[1])) as model:
        with pytest.raises(PromptError, match="no chat template") as caught:
            model.generate("hello")
        assert "raw=True" in caught.value.hint
        assert model.generate("hello", raw=True, max_tokens=4).tokens


def test_prompt_longer_than_n_ctx_is_refused_before_anything_runs(
    random_pair: tuple[Path, Path],
) -> None:
    with load(random_pair, n_ctx=64) as model:
        with pytest.raises(ContextFullError) as caught:
            model.generate("a" * 400)
        assert (caught.value.n_ctx, caught.value.n_prompt) == (64, 400 + 6)
        with pytest.raises(ContextFullError):
            model.generate("hello", image=Image.new("RGB", (1080, 2400)))
        assert model.generate("hello", max_tokens=4).tokens


def test_context_fills_to_its_last_cell(random_pair: tuple[Path, Path]) -> None:
    with load(random_pair, n_ctx=40) as model:
        answer = model.generate("b" * 30, raw=True, seed=3, temperature=1.0)
    if answer.finish_reason == "length":
        assert answer.usage.total_tokens == 41  # the last token needs no cell


def test_mmproj_of_another_model_is_refused(random_pair: tuple[Path, Path], tmp_path: Path) -> None:
    wide = convert(build_checkpoint(tmp_path / "wide", Shape(hidden_size=128)), tmp_path / "out")
    with pytest.raises(PairMismatchError, match="embeddings of 128"):
        load((random_pair[0], wide.mmproj))
    other = convert(build_checkpoint(tmp_path / "other", Shape(seed=9)), tmp_path / "out2")
    with pytest.raises(PairMismatchError, match="another checkpoint"):
        load((random_pair[0], other.mmproj))


def test_text_file_as_mmproj_and_mmproj_as_text_are_refused(
    random_pair: tuple[Path, Path],
) -> None:
    with pytest.raises(PairMismatchError):
        load((random_pair[0], random_pair[0]))
    with pytest.raises(GGUFError, match="not a text model"):
        load((random_pair[1], random_pair[1]))


def test_missing_tensor_is_an_error_with_llama_cpps_reason(
    random_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    broken = rewrite_gguf(random_pair[0], tmp_path / "b.gguf", glm4__block_count=3)
    with pytest.raises(EngineError, match=r"llama\.cpp: .*blk\.2"):
        load((broken, random_pair[1]))


def test_log_is_quiet_until_asked(
    random_pair: tuple[Path, Path],
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with load(random_pair):
        pass
    assert capfd.readouterr() == ("", "")
    with caplog.at_level(logging.DEBUG, "autoglm_gguf.llama_cpp"), load(random_pair):
        pass
    assert any("llama" in record.getMessage() for record in caplog.records)
    assert capfd.readouterr().out == ""


def test_closing_frees_the_model(random_pair: tuple[Path, Path]) -> None:
    for _ in range(3):
        model = load(random_pair)
        stream = model.stream("hello", max_tokens=50)
        next(stream)
        model.close()  # with a stream still open in this thread
        assert list(stream) == []
        with pytest.raises(EngineError, match="closed"):
            model.generate("hello")
        model.close()
    gc.collect()


def test_stream_pieces_add_up_to_the_tokens_bytes(random_pair: tuple[Path, Path]) -> None:
    """A random model writes invalid UTF-8 freely: nothing stalls, nothing is lost."""
    with load(random_pair) as model:
        chunks = list(model.stream("hello", raw=True, max_tokens=200, temperature=1.2, seed=5))
        tokens = [token for chunk in chunks for token in chunk.tokens]
        stop = model.info.stop_ids
        data = b"".join(model._engine.token_bytes(t) for t in tokens if t not in stop)
    assert "".join(chunk.text for chunk in chunks) == data.decode("utf-8", "replace")
    assert [c.finish_reason is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]


@pytest.mark.parametrize("cache", ["f32", "bf16", "q8_0", "q4_0"])
def test_cache_types_run(random_pair: tuple[Path, Path], tmp_path: Path, cache: str) -> None:
    if cache.startswith("q"):  # a quantised cache needs heads of a multiple of 32
        shape = Shape(hidden_size=128, head_dim=32, mrope_section=(2, 2, 4))
        pair = convert(build_checkpoint(tmp_path / "c", shape), tmp_path / "out")
        random_pair = (pair.text, pair.mmproj)
    with load(random_pair, type_k=cache, type_v=cache) as model:
        assert model.generate("hello", max_tokens=4).tokens


def test_quantised_cache_with_odd_heads_is_an_error(random_pair: tuple[Path, Path]) -> None:
    with pytest.raises(EngineError, match="no context"):
        load(random_pair, type_k="q8_0", type_v="q8_0")
