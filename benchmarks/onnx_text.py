"""A q4_0 text GGUF as an ONNX graph, and ONNX Runtime running it.

    python benchmarks/onnx_text.py MODEL.gguf MODEL.onnx

ONNX Runtime GenAI's model builder knows ChatGLM, and none of the architectures of AutoGLM
(``Glm4v``, ``Glm4``). So the graph is made here, of the operators that the builder itself uses:
``MatMulNBits``, ``GroupQueryAttention`` with its rotary embedding and a KV cache that is written
in place, ``SimplifiedLayerNormalization``. A q4_0 block and a ``MatMulNBits`` block of 32 hold the
same numbers: a scale, and 4 bits around 8. Logits are made for the last position only. The weights
are never rounded a second time; the token embedding is kept in f16.

Takes files whose matrices are all q4_0 and whose rotary rows are paired by halves, as ours are for
checkpoints with ``mrope_section``; text only. Needs onnx, onnxruntime and gguf.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_MICROSOFT = "com.microsoft"
_BLOCK = 32
_N_CTX = 1024
_OPSET = 20


def repack(blocks: Array, n_rows: int, n_columns: int) -> tuple[Array, Array]:
    """q4_0 blocks as ``MatMulNBits`` wants them.

    Args:
        blocks: uint8, ``(n_rows, n_columns / 32 * 18)``: an f16 scale, then 16 bytes whose low
            halves are elements 0 to 15 and whose high halves are 16 to 31.

    Returns:
        uint8 ``(n_rows, n_columns / 32, 16)``, two neighbours a byte, the first one low; f32 scales
        ``(n_rows, n_columns / 32)``.
    """
    parts = blocks.reshape(n_rows, n_columns // _BLOCK, 18)
    scales = parts[..., :2].copy().view(np.float16)[..., 0].astype(np.float32)
    packed = parts[..., 2:]
    quants = np.concatenate([packed & 15, packed >> 4], axis=-1)
    return quants[..., 0::2] | quants[..., 1::2] << 4, scales


class Builder:
    """Nodes and weights of a graph, one after another."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        reader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._fields = {name: field.contents() for name, field in reader.fields.items()
                        if name.startswith("glm4.")}  # fmt: skip
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self._n = 0

    def key(self, name: str) -> Any:
        """A value of the file's header."""
        return self._fields[f"glm4.{name}"]

    def node(self, op: str, inputs: Sequence[str], n_outputs: int = 1, **attributes: Any) -> Any:
        """Append a node; its outputs' names."""
        from onnx import helper

        self._n += 1
        outputs = attributes.pop("outputs", [f"v{self._n}_{k}" for k in range(n_outputs)])
        domain = attributes.pop("domain", "")
        self.nodes.append(
            helper.make_node(op, inputs, outputs, f"n{self._n}", domain=domain, **attributes)
        )
        return outputs[0] if n_outputs == 1 else outputs

    def weight(self, name: str, array: Array) -> str:
        """Append an array."""
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def vector(self, name: str) -> str:
        """An f32 tensor of the file."""
        return self.weight(name, np.asarray(self._tensors[name].data, np.float32))

    def norm(self, x: str, name: str) -> str:
        """RMS norm."""
        inputs = [x, self.vector(f"{name}.weight")]
        epsilon = float(self.key("attention.layer_norm_rms_epsilon"))
        return str(
            self.node(
                "SimplifiedLayerNormalization", inputs, axis=-1, epsilon=epsilon, stash_type=1
            )
        )

    def matmul(self, x: str, name: str) -> str:
        """A q4_0 matrix, and its bias if it has one."""
        tensor = self._tensors[f"{name}.weight"]
        n_columns, n_rows = (int(side) for side in tensor.shape)
        if tensor.tensor_type.name != "Q4_0":
            raise SystemExit(f"{name}: {tensor.tensor_type.name}, and only q4_0 is taken over")
        quants, scales = repack(np.asarray(tensor.data), n_rows, n_columns)
        inputs = [x, self.weight(f"{name}.q", quants), self.weight(f"{name}.s", scales.ravel())]
        sizes = {"K": n_columns, "N": n_rows, "bits": 4, "block_size": _BLOCK, "accuracy_level": 4}
        y = self.node("MatMulNBits", inputs, domain=_MICROSOFT, **sizes)
        if f"{name}.bias" in self._tensors:
            y = self.node("Add", [y, self.vector(f"{name}.bias")])
        return str(y)

    def embed(self, ids: str) -> str:
        """Token embeddings, ``(1, n, n_embd)``."""
        from gguf.quants import dequantize

        tensor = self._tensors["token_embd.weight"]
        table = dequantize(np.asarray(tensor.data), tensor.tensor_type).astype(np.float16)
        rows = self.node("Gather", [self.weight("token_embd", table), ids])
        return str(self.node("Cast", [rows], to=1))

    def rotary(self) -> tuple[str, str]:
        """Cosines and sines, ``(n_ctx, n_rot / 2)``."""
        n = int(self.key("rope.dimension_count"))
        speeds = float(self.key("rope.freq_base")) ** (-np.arange(0, n, 2) / n)
        angles = np.arange(_N_CTX)[:, None] * speeds
        return (
            self.weight("cos", np.cos(angles).astype(np.float32)),
            self.weight("sin", np.sin(angles).astype(np.float32)),
        )

    def layer(self, x: str, number: int, caches: tuple[str, str]) -> str:
        """A decoder layer, with a norm behind attention and FFN too."""
        n_heads, n_kv = (int(self.key(f"attention.head_count{k}")) for k in ("", "_kv"))
        head = f"blk.{number}"
        y = self.norm(x, f"{head}.attn_norm")
        q, k, v = (self.matmul(y, f"{head}.attn_{which}") for which in "qkv")
        past = [f"past_{number}_key", f"past_{number}_value"]
        present = [f"present_{number}_key", f"present_{number}_value"]
        y, *_ = self.node(
            "GroupQueryAttention",
            [q, k, v, *past, "seqlens_k", "total_length", *caches],
            3,
            outputs=[f"attention_{number}", *present],
            domain=_MICROSOFT,
            num_heads=n_heads,
            kv_num_heads=n_kv,
            do_rotary=1,
            rotary_interleaved=0,
        )
        y = self.norm(self.matmul(y, f"{head}.attn_output"), f"{head}.post_attention_norm")
        x = self.node("Add", [x, y])
        y = self.matmul(self.norm(x, f"{head}.ffn_norm"), f"{head}.ffn_up")
        gate, up = self.node("Split", [y], 2, axis=-1, num_outputs=2)
        y = self.node("Mul", [self.node("Mul", [gate, self.node("Sigmoid", [gate])]), up])
        y = self.norm(self.matmul(y, f"{head}.ffn_down"), f"{head}.post_ffw_norm")
        return str(self.node("Add", [x, y]))


def build(gguf: Path, out: Path) -> Path:
    """Write the graph and, beside it, its weights and sizes; returns ``out``."""
    from onnx import TensorProto, helper, save_model

    make = helper.make_tensor_value_info
    b = Builder(gguf)
    n_layers, n_kv = int(b.key("block_count")), int(b.key("attention.head_count_kv"))
    n_head = int(b.key("attention.key_length"))
    caches = b.rotary()
    x = b.embed("ids")
    for number in range(n_layers):
        x = b.layer(x, number, caches)
    last = b.node("Gather", [x, b.weight("last", np.array([-1], np.int64))], axis=1)
    b.node("Identity", [b.matmul(b.norm(last, "output_norm"), "output")], outputs=["logits"])
    shape = [1, n_kv, _N_CTX, n_head]
    names = [f"{number}_{part}" for number in range(n_layers) for part in ("key", "value")]
    inputs = [
        make("ids", TensorProto.INT64, [1, "n"]),
        make("seqlens_k", TensorProto.INT32, [1]),
        make("total_length", TensorProto.INT32, []),
        *(make(f"past_{name}", TensorProto.FLOAT, shape) for name in names),
    ]
    outputs = [
        make("logits", TensorProto.FLOAT, [1, 1, "n_vocab"]),
        *(make(f"present_{name}", TensorProto.FLOAT, shape) for name in names),
    ]
    graph = helper.make_graph(b.nodes, "text", inputs, outputs, b.weights)
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, out, save_as_external_data=True, location=f"{out.name}.data")
    out.with_suffix(".json").write_text(json.dumps({"n_layers": n_layers, "cache": shape}))
    return out


class OnnxText:
    """The graph in ONNX Runtime, on the CPU.

    Args:
        path: What `build` wrote.
        n_threads: Of one operator.
    """

    def __init__(self, path: Path, n_threads: int) -> None:
        import onnxruntime

        sizes = json.loads(path.with_suffix(".json").read_text())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = n_threads, 1
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        names = [f"{k}_{part}" for k in range(sizes["n_layers"]) for part in ("key", "value")]
        # One buffer for what was and what will be: new cells are written in place.
        self._cache = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(sizes["cache"], np.float32))
            for name in names
        }
        self._n_cells = 0

    def generate(self, ids: Sequence[int], n: int) -> Iterator[int]:
        """Greedy tokens after a prompt; nothing of an earlier one is kept."""
        self._n_cells = 0
        logits = self.evaluate(ids)
        for k in range(n):
            token = int(logits.argmax())
            yield token
            if k < n - 1:
                logits = self.evaluate([token])

    def evaluate(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits ``(n_vocab,)`` behind these tokens, which join the KV cache."""
        self._n_cells += len(ids)
        binding = self._session.io_binding()
        binding.bind_cpu_input("ids", np.array([ids], np.int64))
        binding.bind_cpu_input("seqlens_k", np.array([self._n_cells - 1], np.int32))
        binding.bind_cpu_input("total_length", np.array(self._n_cells, np.int32))
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        found: NDArray[np.float32] = binding.get_outputs()[-1].numpy()
        return found.reshape(-1)


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
