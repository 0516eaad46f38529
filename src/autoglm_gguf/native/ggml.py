"""ggml's tensor types and its own quantisation kernels, called on numpy rows.

Knows bytes and rows; knows nothing of models or files. The kernels release the GIL.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import numpy as np
from numpy.typing import NDArray

from autoglm_gguf.native.library import engine_error, load_ggml


class GGMLType(IntEnum):
    """Tensor types this package reads or writes, with ggml's numbers."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ3_XXS = 18
    IQ4_NL = 20
    IQ3_S = 21
    IQ4_XS = 23
    BF16 = 30


def block_size(ggml_type: int) -> int:
    """Elements per quantisation block; 1 for plain floats."""
    return int(_lib().ggml_blck_size(ggml_type))


def row_bytes(ggml_type: int, n_per_row: int) -> int:
    """Bytes of one row of ``n_per_row`` elements (a multiple of the block size)."""
    return int(_lib().ggml_row_size(ggml_type, n_per_row))


def to_float32(raw: NDArray[np.generic], ggml_type: int) -> NDArray[np.float32]:
    """Widen f16 (uint16 or float16 words) or bf16 (uint16 words) to f32; f32 passes through.

    Args:
        raw: Any shape, C-contiguous.
        ggml_type: F32, F16 or BF16.

    Returns:
        The same shape.
    """
    if ggml_type == GGMLType.F32:
        return np.ascontiguousarray(raw).view(np.float32)
    source = np.ascontiguousarray(raw)
    out = np.empty(source.shape, np.float32)
    widen = "ggml_fp16_to_fp32_row" if ggml_type == GGMLType.F16 else "ggml_bf16_to_fp32_row"
    getattr(_lib(), widen)(_pointer(source), _pointer(out), source.size)
    return out


def quantize(
    rows: NDArray[np.float32], ggml_type: int, imatrix: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Encode rows as ``ggml_type``, byte for byte as llama-quantize does.

    Args:
        rows: ``(n_rows, n_per_row)``, f32, C-contiguous; n_per_row a multiple of the block size.
        ggml_type: The target type.
        imatrix: ``(n_per_row,)``, the importance of each column; None weighs all alike.

    Returns:
        ``(n_rows, row_bytes)``.

    Raises:
        EngineError: ggml wrote another number of bytes than the type asks for.
    """
    rows = np.ascontiguousarray(rows)
    n_rows, n_per_row = rows.shape
    out = np.empty((n_rows, row_bytes(ggml_type, n_per_row)), np.uint8)
    if ggml_type == GGMLType.F32:
        return rows.view(np.uint8).reshape(out.shape)
    if ggml_type == GGMLType.BF16:
        _lib().ggml_fp32_to_bf16_row_ref(_pointer(rows), _pointer(out), rows.size)
        return out
    if ggml_type == GGMLType.F16:
        _lib().ggml_fp32_to_fp16_row(_pointer(rows), _pointer(out), rows.size)
        return out
    if imatrix is not None:
        imatrix = np.ascontiguousarray(imatrix, np.float32)
        if imatrix.shape != (n_per_row,):
            raise ValueError(f"imatrix of shape {imatrix.shape} for rows of {n_per_row}")
    weights = None if imatrix is None else _pointer(imatrix)
    n_bytes = _lib().ggml_quantize_chunk(
        ggml_type, _pointer(rows), _pointer(out), 0, n_rows, n_per_row, weights
    )
    if n_bytes != out.nbytes:
        raise engine_error(f"ggml: quantised {n_bytes} bytes, not {out.nbytes}")
    return out


def dequantize(raw: NDArray[np.uint8], ggml_type: int, n_per_row: int) -> NDArray[np.float32]:
    """Decode rows of any type this package knows.

    Args:
        raw: ``(n_rows, row_bytes)``, C-contiguous.
        ggml_type: What the rows are.
        n_per_row: Elements per row.

    Returns:
        ``(n_rows, n_per_row)``.

    Raises:
        EngineError: The installed ggml cannot decode the type.
    """
    raw = np.ascontiguousarray(raw)
    if ggml_type == GGMLType.F32:
        return raw.view(np.float32)
    traits = ctypes.cast(_lib().ggml_get_type_traits(ggml_type), ctypes.POINTER(_TypeTraits))
    to_float = traits.contents.to_float
    if not to_float:
        raise engine_error(f"ggml: cannot decode type {ggml_type}")
    out = np.empty((raw.shape[0], n_per_row), np.float32)
    to_float(_pointer(raw), _pointer(out), out.size)
    return out


@dataclass(frozen=True, slots=True)
class Device:
    """One device of ggml's registry."""

    name: str
    """As ``device=`` takes it: ``Vulkan0``, ``Metal``, ``CPU``."""
    description: str
    backend: str
    """Who drives it: ``Vulkan``, ``MTL``, ``CUDA``, ``CPU``."""
    kind: str
    """``cpu``, ``gpu``, ``igpu`` (a GPU in the same memory), ``accel``, ``meta``."""
    total_bytes: int
    free_bytes: int
    """As the driver reports it now; 0 for both where it does not."""
    maps_files: bool
    """Weights can stay in the mapped file, without a copy."""

    @property
    def is_gpu(self) -> bool:
        """Layers can be placed on it."""
        return self.kind in ("gpu", "igpu")

    @property
    def is_software(self) -> bool:
        """A Vulkan driver that computes on the CPU; ggml tells it only by its name."""
        return any(name in self.description.lower() for name in _SOFTWARE)

    @property
    def shares_memory(self) -> bool:
        """Its memory is the machine's main memory."""
        return self.kind == "igpu" or self.backend == _METAL or self.is_software

    @property
    def counts_in_process(self) -> bool:
        """The system counts its buffers among this process's pages."""
        return self.backend == _METAL or self.is_software


_METAL = "MTL"  # ggml-metal's registry name
_SOFTWARE = ("llvmpipe", "lavapipe", "swiftshader")
_DEVICE_KINDS = ("cpu", "gpu", "igpu", "accel", "meta")  # enum ggml_backend_dev_type


def list_devices() -> list[Device]:
    """Every device that the installed ggml can drive here.

    Raises:
        NativeLibraryError: llama-cpp-python is missing or not the pinned version.
    """
    lib = _lib()
    found: list[Device] = []
    for index in range(lib.ggml_backend_dev_count()):
        device = lib.ggml_backend_dev_get(index)
        props = _DeviceProps()
        lib.ggml_backend_dev_get_props(device, ctypes.byref(props))
        backend = lib.ggml_backend_reg_name(lib.ggml_backend_dev_backend_reg(device))
        kind = props.type if 0 <= props.type < len(_DEVICE_KINDS) else len(_DEVICE_KINDS) - 1
        found.append(
            Device(
                name=props.name.decode("utf-8", "replace"),
                description=(props.description or b"").decode("utf-8", "replace").strip(),
                backend=backend.decode("utf-8", "replace"),
                kind=_DEVICE_KINDS[kind],
                total_bytes=int(props.memory_total),
                free_bytes=int(props.memory_free),
                maps_files=bool(props.buffer_from_host_ptr),
            )
        )
    return found


def device_handle(name: str) -> int:
    """The ``ggml_backend_dev_t`` of a device in `list_devices`.

    Raises:
        EngineError: ggml does not know it.
    """
    handle = _lib().ggml_backend_dev_by_name(name.encode())
    if not handle:
        raise engine_error(f"ggml: no device {name}", hint="list them: autoglm-gguf doctor")
    return int(handle)


def list_backends() -> list[str]:
    """What the installed ggml was built for, devices or not: ``["Vulkan", "CPU"]``."""
    lib = _lib()
    names = (
        lib.ggml_backend_reg_name(lib.ggml_backend_reg_get(index))
        for index in range(lib.ggml_backend_reg_count())
    )
    return [name.decode("utf-8", "replace") for name in names]


def can_compute(name: str) -> bool:
    """Whether a device multiplies two small matrices of whole numbers exactly.

    A build for another processor, or a broken driver, may end the process here instead.

    Args:
        name: As in `Device.name`.

    Raises:
        EngineError: There is no such device.
    """
    lib = _lib()
    backend = lib.ggml_backend_dev_init(device_handle(name), None)
    context = lib.ggml_init(_InitParams(_SMALL_GRAPH_BYTES, None, True))
    rows = (np.arange(64 * 32, dtype=np.float32) % 7).reshape(64, 32)
    columns = (np.arange(16 * 32, dtype=np.float32) % 5).reshape(16, 32)
    found = np.empty((16, 64), np.float32)
    try:
        left, right = (lib.ggml_new_tensor_2d(context, 0, 32, n) for n in (64, 16))
        product = lib.ggml_mul_mat(context, left, right)
        graph = lib.ggml_new_graph(context)
        lib.ggml_build_forward_expand(graph, product)
        if not backend or not (buffer := lib.ggml_backend_alloc_ctx_tensors(context, backend)):
            return False
        for tensor, values in ((left, rows), (right, columns)):
            lib.ggml_backend_tensor_set(tensor, _pointer(values), 0, values.nbytes)
        done = lib.ggml_backend_graph_compute(backend, graph) == 0
        lib.ggml_backend_tensor_get(product, _pointer(found), 0, found.nbytes)
        lib.ggml_backend_buffer_free(buffer)
        return bool(done and np.array_equal(found, columns @ rows.T))
    finally:
        lib.ggml_free(context)
        if backend:
            lib.ggml_backend_free(backend)


def cpu_registry() -> int:
    """The CPU backend's ``ggml_backend_reg_t``."""
    device = _lib().ggml_backend_dev_by_type(_DEVICE_TYPE_CPU)
    return int(_lib().ggml_backend_dev_backend_reg(device))


def find_in_cpu_backend(name: bytes) -> int | None:
    """Address of a function that the CPU backend offers by name; None if it does not."""
    address: int | None = _lib().ggml_backend_reg_get_proc_address(cpu_registry(), name)
    return address


def repack_buffer_type() -> int | None:
    """The CPU backend's buffer type for weights in kernel order; None where there is none.

    Weights put there are copied into anonymous memory and run 1.5 to 2 times as fast.
    """
    lib = _lib()
    device = lib.ggml_backend_dev_by_type(_DEVICE_TYPE_CPU)
    address = find_in_cpu_backend(b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    list_types = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
    types = list_types(device)
    index = 0
    while types and types[index]:
        if lib.ggml_backend_buft_name(types[index]) == b"CPU_REPACK":
            return int(types[index])
        index += 1
    return None


def host_buffer_type() -> int:
    """A buffer type of plain anonymous memory that llama.cpp never replaces by the mapped file."""
    page = ctypes.create_string_buffer(256)
    aligned = (ctypes.addressof(page) + 63) // 64 * 64
    buffer = _lib().ggml_backend_cpu_buffer_from_ptr(aligned, 64)
    kind = int(_lib().ggml_backend_buffer_get_type(buffer))
    _lib().ggml_backend_buffer_free(buffer)
    return kind


@cache
def can_repack(ggml_type: int, n_per_row: int, n_rows: int) -> bool:
    """Whether this CPU has kernels for a matrix in `repack_buffer_type`'s order.

    llama.cpp ends the process when a matrix without such kernels is put there, so it is asked with
    a small one of the same type and divisibility.
    """
    kind, lib = repack_buffer_type(), _lib()
    if kind is None or n_per_row % block_size(ggml_type):
        return False
    context = lib.ggml_init(_InitParams(1 << 14, None, True))
    try:
        tensor = lib.ggml_new_tensor_2d(
            context, ggml_type, n_per_row, _REPACK_ROWS + n_rows % _REPACK_ROWS
        )
        buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(context, kind)
        if not buffer:
            return False
        fields = ctypes.cast(tensor, ctypes.POINTER(TensorFields)).contents
        known = fields.data == lib.ggml_get_data(tensor)  # else ggml_tensor has another layout
        found = bool(fields.extra) and known
        lib.ggml_backend_buffer_free(buffer)
        return found
    finally:
        lib.ggml_free(context)


def tensor_name(tensor: int) -> bytes:
    """The name of a live ``ggml_tensor``."""
    name: bytes = _lib().ggml_get_name(tensor)
    return name


def operation_name(tensor: int) -> bytes:
    """What computes a live ``ggml_tensor``, such as ``MUL_MAT``."""
    name: bytes = _lib().ggml_op_desc(tensor)
    return name


def tensor_fields(tensor: int) -> TensorFields:
    """The fields of a live ``ggml_tensor``.

    Raises:
        EngineError: ggml_tensor has another layout than the pinned version's.
    """
    fields = ctypes.cast(tensor, ctypes.POINTER(TensorFields)).contents
    if fields.data != _lib().ggml_get_data(tensor):
        raise engine_error("ggml: ggml_tensor has another layout than this package knows")
    return fields


def read_tensor_bytes(tensor: int, offset: int, out: NDArray[np.float32]) -> None:
    """Copy bytes of a computed ``ggml_tensor`` from wherever it lies.

    Args:
        tensor: Has at least ``offset + out.nbytes`` bytes.
        offset: First byte.
        out: C-contiguous; filled.
    """
    _lib().ggml_backend_tensor_get(tensor, _pointer(out), offset, out.nbytes)


_DEVICE_TYPE_CPU = 0  # enum ggml_backend_dev_type
_SMALL_GRAPH_BYTES = 1 << 20  # metadata of a default graph and a handful of tensors
_REPACK_ROWS = 64  # a multiple of every row interleaving ggml has


class _DeviceProps(ctypes.Structure):
    """ggml-backend.h, ``struct ggml_backend_dev_props`` with its ``caps`` unfolded."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("async_", ctypes.c_bool),
        ("host_buffer", ctypes.c_bool),
        ("buffer_from_host_ptr", ctypes.c_bool),
        ("events", ctypes.c_bool),
        ("mmap_support", ctypes.c_bool),
    )


class _InitParams(ctypes.Structure):
    """ggml.h, ``struct ggml_init_params``."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class TensorFields(ctypes.Structure):
    """ggml.h, ``struct ggml_tensor``."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
    )


class _TypeTraits(ctypes.Structure):
    """ggml.h, ``struct ggml_type_traits``, up to the field that is used."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def _pointer(array: NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@cache
def _lib() -> ctypes.CDLL:
    lib = load_ggml()
    pointer, i64, size, enum = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_int
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "ggml_blck_size": (i64, [enum]),
        "ggml_row_size": (size, [enum, i64]),
        "ggml_get_type_traits": (pointer, [enum]),
        "ggml_quantize_chunk": (size, [enum, pointer, pointer, i64, i64, i64, pointer]),
        "ggml_bf16_to_fp32_row": (None, [pointer, pointer, i64]),
        "ggml_fp16_to_fp32_row": (None, [pointer, pointer, i64]),
        "ggml_fp32_to_bf16_row_ref": (None, [pointer, pointer, i64]),
        "ggml_fp32_to_fp16_row": (None, [pointer, pointer, i64]),
        "ggml_init": (pointer, [_InitParams]),
        "ggml_free": (None, [pointer]),
        "ggml_new_tensor_2d": (pointer, [pointer, enum, i64, i64]),
        "ggml_mul_mat": (pointer, [pointer, pointer, pointer]),
        "ggml_new_graph": (pointer, [pointer]),
        "ggml_build_forward_expand": (None, [pointer, pointer]),
        "ggml_get_data": (pointer, [pointer]),
        "ggml_get_name": (ctypes.c_char_p, [pointer]),
        "ggml_op_desc": (ctypes.c_char_p, [pointer]),
        "ggml_backend_dev_count": (size, []),
        "ggml_backend_dev_get": (pointer, [size]),
        "ggml_backend_dev_get_props": (None, [pointer, ctypes.POINTER(_DeviceProps)]),
        "ggml_backend_reg_count": (size, []),
        "ggml_backend_reg_get": (pointer, [size]),
        "ggml_backend_reg_name": (ctypes.c_char_p, [pointer]),
        "ggml_backend_dev_by_type": (pointer, [enum]),
        "ggml_backend_dev_by_name": (pointer, [ctypes.c_char_p]),
        "ggml_backend_dev_init": (pointer, [pointer, ctypes.c_char_p]),
        "ggml_backend_free": (None, [pointer]),
        "ggml_backend_alloc_ctx_tensors": (pointer, [pointer, pointer]),
        "ggml_backend_tensor_set": (None, [pointer, pointer, size, size]),
        "ggml_backend_tensor_get": (None, [pointer, pointer, size, size]),
        "ggml_backend_graph_compute": (enum, [pointer, pointer]),
        "ggml_backend_dev_backend_reg": (pointer, [pointer]),
        "ggml_backend_reg_get_proc_address": (pointer, [pointer, ctypes.c_char_p]),
        "ggml_backend_buft_name": (ctypes.c_char_p, [pointer]),
        "ggml_backend_cpu_buffer_from_ptr": (pointer, [pointer, size]),
        "ggml_backend_buffer_get_type": (pointer, [pointer]),
        "ggml_backend_buffer_free": (None, [pointer]),
        "ggml_backend_alloc_ctx_tensors_from_buft": (pointer, [pointer, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = arguments
    return lib
