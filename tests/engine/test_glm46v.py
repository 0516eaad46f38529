"""GLM-4.6V-Flash's tokens under both architecture names: everything goes by name, nothing by id."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import (
    GLM41V,
    GLM46V,
    build_checkpoint,
    build_scripted_checkpoint,
    rewrite_gguf,
    token_ids,
)
from family import GLM46V_TEMPLATE, glm46v
from PIL import Image

from autoglm_gguf import AutoGLM, ModelPair, convert, read_header

pytestmark = pytest.mark.native

IDS = token_ids(GLM46V)
STOPS = {IDS["<|endoftext|>"], IDS["<|user|>"], IDS["<|observation|>"]}
IMAGE = Image.new("RGB", (140, 112), "red")
CONTROL, USER_DEFINED = 3, 4


@pytest.fixture(
    scope="module", params=["Glm46VForConditionalGeneration", "Glm4vForConditionalGeneration"]
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    base = tmp_path_factory.mktemp(request.param)
    return convert(build_checkpoint(base / "flash", glm46v(request.param)), base, "q8_0")


def load(pair: ModelPair, **options: object) -> AutoGLM:
    return AutoGLM.load(pair.text, mmproj=pair.mmproj, n_ctx=512, **options)


def test_layouts_give_the_same_number_to_other_tokens() -> None:
    """What makes these tests worth something; the distances are the published ones."""
    first, older = IDS["<|endoftext|>"], token_ids(GLM41V)
    assert IDS["<|code_middle|>"] - first == 151348 - 151329
    assert IDS["<|image|>"] - first == 151363 - 151329
    assert older["</answer>"] == IDS["<|code_middle|>"]
    assert older["<|image|>"] == IDS["<|begin_of_audio|>"]
    assert not {"<answer>", "</answer>"} & IDS.keys()


def test_header_places_stops_by_name(pair: ModelPair) -> None:
    metadata = read_header(pair.text).metadata
    expected = {
        "general.architecture": "glm4",
        "glm4.rope.freq_base": 500_000.0,
        "glm4.rope.dimension_sections": [1, 1, 2, 0],
        "tokenizer.chat_template": GLM46V_TEMPLATE,
        "tokenizer.ggml.eos_token_id": IDS["<|endoftext|>"],
        "tokenizer.ggml.eot_token_id": IDS["<|user|>"],
        "tokenizer.ggml.eom_token_id": IDS["<|observation|>"],
        "tokenizer.ggml.padding_token_id": IDS["<|endoftext|>"],
    }
    assert {key: metadata.get(key) for key in expected} == expected
    assert set(metadata["autoglm.eos_token_ids"]) == STOPS
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert all(tokens[i] == token for token, i in IDS.items())
    kinds = {token: types[IDS[token]] for token in GLM46V.specials}
    assert kinds["<|user|>"] == kinds["<|begin_of_image|>"] == CONTROL
    assert kinds["<|image|>"] == kinds["<think>"] == kinds["<|code_middle|>"] == USER_DEFINED


def test_mmproj_holds_the_checkpoints_image_limits(pair: ModelPair) -> None:
    assert pair.mmproj is not None
    metadata = read_header(pair.mmproj).metadata
    assert metadata["clip.projector_type"] == "glm4v"
    assert metadata["autoglm.vision.max_pixels"] == 9_633_792


def test_turns_end_at_the_checkpoints_stops_alone(pair: ModelPair) -> None:
    with load(pair) as model:
        assert model.info.stop_ids == STOPS
        assert model.info.notes == ()


def test_stops_are_completed_by_name_when_the_file_has_no_list(
    pair: ModelPair, tmp_path: Path
) -> None:
    """What upstream's converter writes."""
    bare = rewrite_gguf(
        pair.text,
        tmp_path / "up.gguf",
        drop=("autoglm.", "tokenizer.ggml.eo", "tokenizer.chat_template"),
    )
    with AutoGLM.load(bare, mmproj=pair.mmproj, n_ctx=512) as model:
        assert model.info.stop_ids == STOPS
        assert "[gMASK]<sop>" in (model.info.chat_template or "")
        answer = model.generate("hello", image=IMAGE, max_tokens=1)
    assert answer.usage.image_tokens == 20


def test_prompt_of_an_image_takes_its_slot(pair: ModelPair) -> None:
    content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "hello"}]
    with load(pair) as model:
        prompt = model.render([{"role": "user", "content": content}])
        assert prompt.segments == (
            "[gMASK]<sop><|user|>\n<|begin_of_image|>",
            "<|end_of_image|>hello<|assistant|>",
        )
        head, tail = (model.tokenize(segment) for segment in prompt.segments)
        answer = model.generate([{"role": "user", "content": content}], max_tokens=1)
    line_break = "Ċ"
    expected = ("[gMASK]", "<sop>", "<|user|>", line_break, "<|begin_of_image|>")
    assert head == [IDS[token] for token in expected]
    assert tail == [IDS[token] for token in ("<|end_of_image|>", "hello", "<|assistant|>")]
    assert answer.usage.image_tokens == 20
    assert answer.usage.prompt_tokens == len(head) + 20 + len(tail)


def test_prompt_drops_thinking_from_the_history(pair: ModelPair) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>long</think>\nb"},
        {"role": "user", "content": "c"},
    ]
    with load(pair) as model:
        assert model.render(turns).text == (
            "[gMASK]<sop><|user|>\na<|assistant|>\n<think></think>\nb<|user|>\nc<|assistant|>"
        )


def test_literal_image_token_of_someones_text_is_no_slot(pair: ModelPair) -> None:
    content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "<|image|>"}]
    with load(pair) as model:
        assert len(model.render([{"role": "user", "content": content}]).segments) == 2


def scripted(base: Path, pieces: tuple[str, ...]) -> AutoGLM:
    """A model of this layout that says ``pieces`` and then ends the turn."""
    checkpoint = build_scripted_checkpoint(base / "scripted", pieces, shape=glm46v())
    return load(convert(checkpoint, base / "out", "q8_0"))


def test_end_of_answer_in_plain_letters_does_not_end_a_turn(tmp_path: Path) -> None:
    """It is no token of this model, so its text may speak of it."""
    with scripted(tmp_path, ("The tag ", "</ans", "wer>", " closes it.")) as model:
        answer = model.generate("<|assistant|>", raw=True, max_tokens=16)
    assert answer.text == "The tag </answer> closes it."
    assert (answer.finish_reason, answer.tokens[-1]) == ("stop", IDS["<|endoftext|>"])


def test_code_middle_does_not_end_a_turn(tmp_path: Path) -> None:
    with scripted(tmp_path, ("a", "<|code_middle|>", "b")) as model:
        answer = model.generate("<|assistant|>", raw=True, max_tokens=16)
    said = [IDS[token] for token in ("a", "<|code_middle|>", "b", "<|endoftext|>")]
    assert (list(answer.tokens), answer.finish_reason) == (said, "stop")


def test_act_ends_at_the_end_of_answer_in_plain_letters(tmp_path: Path) -> None:
    """The action language closes an answer with it, whatever the model's own stops are."""
    pieces = ("<answer>", 'do(action="Home")', "</ans", "wer>", "and more")
    with scripted(tmp_path, pieces) as model:
        step = model.act("go home", system=None)
    assert step.text == '<answer>do(action="Home")'
    assert step.action.name == "Home"
