"""What is seen of a graph, against numbers worked out from the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from builders import Shape, build_checkpoint

from autoglm_gguf import EngineError, convert, read_header
from autoglm_gguf.config import ContextParams
from autoglm_gguf.engine.llama import LlamaEngine
from autoglm_gguf.native.nodes import InputWatch, _plain_name

pytestmark = pytest.mark.native
N_CTX = 64
TOKENS = [5, 90, 17, 200, 33, 8, 8, 121, 60, 2, 250]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("nodes")
    return convert(build_checkpoint(base / "model", Shape()), base, "f32").text


@pytest.fixture
def open_engine(exact: Path) -> Iterator[Callable[..., LlamaEngine]]:
    opened: list[LlamaEngine] = []

    def open_engine(watch: InputWatch, text: Path = exact, n_batch: int = N_CTX) -> LlamaEngine:
        params = ContextParams(n_ctx=N_CTX, n_batch=n_batch, n_outputs=N_CTX, n_threads=1)
        opened.append(LlamaEngine(text, None, params, watches=(watch,)))
        watch.begin()
        return opened[-1]

    yield open_engine
    for engine in opened:
        engine.close()


def matrices(text: Path) -> list[str]:
    tensors = read_header(text).tensors.values()
    return [t.name for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2]


def read_tensor(text: Path, name: str) -> np.ndarray:
    info = read_header(text).tensors[name]
    values = np.frombuffer(text.read_bytes(), np.float32, info.n_bytes // 4, info.offset)
    return values.reshape(info.shape[::-1]).astype(np.float64)


def run(engine: LlamaEngine, tokens: Sequence[int]) -> None:
    for at in range(0, len(tokens), engine.n_batch):
        part = tokens[at : at + engine.n_batch]
        engine.eval_tokens(part, n_outputs=len(part))


def test_inputs_of_the_first_layer_are_the_normed_embeddings(
    exact: Path, open_engine: Callable[..., LlamaEngine]
) -> None:
    watch = InputWatch(matrices(exact))
    run(open_engine(watch), TOKENS)
    watch.check()
    embedded = read_tensor(exact, "token_embd.weight")[TOKENS]
    normed = embedded / np.sqrt((embedded**2).mean(1, keepdims=True) + 1e-5)
    normed *= read_tensor(exact, "blk.0.attn_norm.weight")
    for letter in "qkv":
        found = watch.sums[f"blk.0.attn_{letter}.weight"]
        assert found == pytest.approx((normed**2).sum(0), rel=1e-5)


def test_every_row_counts_in_every_layer(
    exact: Path, open_engine: Callable[..., LlamaEngine]
) -> None:
    watch = InputWatch(matrices(exact))
    run(open_engine(watch), TOKENS)
    assert watch.sums.keys() == watch.counts.keys() == set(matrices(exact))
    assert set(watch.counts.values()) == {len(TOKENS)}  # of the last layer too


def test_sums_do_not_depend_on_the_batch(
    exact: Path, open_engine: Callable[..., LlamaEngine]
) -> None:
    whole, parts = InputWatch(matrices(exact)), InputWatch(matrices(exact))
    run(open_engine(whole), TOKENS)
    run(open_engine(parts, n_batch=3), TOKENS)
    for name, values in whole.sums.items():
        assert parts.sums[name] == pytest.approx(values, rel=1e-4), name


def test_graph_ends_after_the_last_matrix_and_goes_on_with_the_next_batch(
    exact: Path, open_engine: Callable[..., LlamaEngine]
) -> None:
    names = matrices(exact)
    through, ended = InputWatch(names), InputWatch(names, last="blk.1.ffn_down.weight")
    for watch in (through, ended):
        run(open_engine(watch, n_batch=4), TOKENS)
        watch.check()
    for name, values in through.sums.items():
        assert np.array_equal(ended.sums[name], values), name


def test_nothing_is_seen_or_ended_before_it_begins(exact: Path) -> None:
    """A GPU's self-test runs before: its logits must be whole."""
    params = ContextParams(n_ctx=N_CTX, n_batch=N_CTX, n_outputs=N_CTX, n_threads=1)
    found = []
    for watches in ((), (InputWatch(matrices(exact), last="blk.0.attn_q.weight"),)):
        engine = LlamaEngine(exact, None, params, watches=watches)
        run(engine, TOKENS)
        found.append(engine.logits())
        engine.close()
        assert all(not watch.sums for watch in watches)
    assert np.array_equal(*found)


def test_sums_go_on_from_others(exact: Path, open_engine: Callable[..., LlamaEngine]) -> None:
    watch = InputWatch(matrices(exact))
    engine = open_engine(watch)
    run(engine, TOKENS)
    sums, counts = dict(watch.sums), dict(watch.counts)
    watch.begin(sums, counts)
    engine.keep(0)
    run(engine, TOKENS)
    assert set(watch.counts.values()) == {2 * len(TOKENS)}
    for name, values in sums.items():
        assert watch.sums[name] == pytest.approx(2 * values), name


def test_only_named_matrices_are_seen(exact: Path, open_engine: Callable[..., LlamaEngine]) -> None:
    watch = InputWatch(["output.weight", "blk.1.attn_q.weight"])
    run(open_engine(watch), TOKENS)
    assert sorted(watch.sums) == ["blk.1.attn_q.weight", "output.weight"]


def test_values_that_are_not_finite_are_an_error(
    exact: Path, tmp_path: Path, open_engine: Callable[..., LlamaEngine]
) -> None:
    info = read_header(exact).tensors["blk.1.attn_norm.weight"]
    data = bytearray(exact.read_bytes())
    data[info.offset : info.offset + 4] = np.float32("inf").tobytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    watch = InputWatch(matrices(exact))
    run(open_engine(watch, broken), TOKENS)
    with pytest.raises(EngineError, match=r"blk\.1\.attn_.*not finite"):
        watch.check()
    watch.begin()
    watch.check()


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        (b"blk.0.attn_q.weight", b"blk.0.attn_q.weight"),
        (b"CUDA0#blk.0.attn_q.weight#0", b"blk.0.attn_q.weight"),
        (b"CPU#blk.0.attn_q.weight", b"blk.0.attn_q.weight"),
    ],
)
def test_names_of_copies_are_the_originals(name: bytes, plain: bytes) -> None:
    assert _plain_name(name) == plain
