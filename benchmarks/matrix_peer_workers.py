"""The libraries that `matrix_peers.py` times: one in this process, which is asked line by line what to do.

    python benchmarks/matrix_peer_workers.py fips --threads 1 --part 16 --megabytes 300

A row is a matrix as one library stores it, in many copies, so that weights come from memory. ``part`` copies are
multiplied in one call, as a library would compute a model: one graph of ggml, ONNX Runtime and OpenVINO, layers one
after the other in torch. Those of a graph write to the same memory, as a model uses memory again, except the first,
which is compared with a product in floats. Requests and answers are lines of JSON: ``["about"]``; ``["shape", ROWS,
COLS]`` makes all rows; ``["tokens", COUNT]`` prepares and compares their products; ``["time", ROW, PARTS]`` is answered
with the seconds of one product.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import gc
import importlib
import importlib.util
import itertools
import json
import math
import os
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from generation import random_layer
from numpy.typing import NDArray

torch: Any = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
"""llama.cpp's Python need not have it."""
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Calls = list[Callable[[], object]]
FIPS = ("int4g64", "tc4g64", "nl4g64", "int5g64", "nl5g64", "int8")
GGML_TYPES = {"Q4_0": 2, "Q4_K": 12, "Q5_K": 13, "Q8_0": 8}
ONNX = ((4, 32), (4, 64), (4, 128), (8, 64), (8, 128))
"""Bits and weights under one scale."""
OPENVINO: tuple[tuple[int, int | None], ...] = ((4, 64), (4, 128), (8, None))
TORCH_GROUPS = (32, 64)
WARM_S = 0.02
"""Of calls before a turn is timed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What every row is made of."""

    matrix: Floats
    part: int
    megabytes: float
    threads: int

    def parts(self, bits: float) -> range:
        """Calls that visit copies of at least so many megabytes."""
        return range(max(1, math.ceil(self.megabytes * 1e6 / (self.part * self.matrix.size * bits / 8))))


class Row(ABC):
    """Copies of one matrix as a library stores it."""

    bits: float
    """Stored for one weight, scales included."""
    matrix: Floats
    """What products are compared with."""
    note = ""

    @abstractmethod
    def calls(self, x: Floats) -> Calls:
        """For every part what multiplies tokens by its matrices; none where the row is not for so many tokens."""

    @abstractmethod
    def product(self) -> Floats:
        """By the first matrix of the part that was called last."""


Rows = Iterator[tuple[str, Callable[[], Row]]]


def grouped(matrix: Floats, group: int, largest: int) -> tuple[NDArray[np.int8], Floats]:
    """Integers of (rows, groups, group) and scales that map the largest magnitude of a group to ``largest``."""
    groups = matrix.reshape(len(matrix), -1, group)
    scales = np.abs(groups).max(2, keepdims=True) / np.float32(largest)
    return np.round(groups / scales).astype(np.int8), scales


def half_bytes(integers: NDArray[Any]) -> Bytes:
    """Two integers of 4 bits in a byte, the first in the low half."""
    codes = (integers & 15).astype(np.uint8)
    packed: Bytes = codes[..., ::2] | codes[..., 1::2] << np.uint8(4)
    return packed


class Products(Row):
    """A call of Python for each matrix, as torch computes layers."""

    dtype = "bfloat16"
    parts: list[list[Callable[[Any], Any]]]

    def calls(self, x: Floats) -> Calls:
        return [partial(self.multiply, part, torch.from_numpy(x).to(getattr(torch, self.dtype))) for part in self.parts]

    def multiply(self, products: list[Callable[[Any], Any]], x: Any) -> None:
        with torch.inference_mode():
            self.y = products[0](x)
            for product in products[1:]:
                product(x)

    def product(self) -> Floats:
        return np.asarray(self.y.float())


class Layers(Products):
    """Packed layers of fips, in memory as a model that was loaded has them."""

    def __init__(self, work: Work, values: str) -> None:
        rows, cols = work.matrix.shape
        layer = random_layer(
            rows, cols, role="up" if rows > cols else "down", values=values,
            rotation=64 if values[:2] in ("nl", "tc") else 1, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        self.bits = 8 * layer.packed().nbytes() / work.matrix.size
        self.matrix = layer.dense_weight().numpy()
        self.parts = [[self.loaded(layer) for _ in range(work.part)] for _ in work.parts(self.bits)]

    @staticmethod
    def loaded(layer: Any) -> Any:
        from fips.storage.memory import copied

        new = copy.deepcopy(layer)
        for name, buffer in new.named_buffers(recurse=False):
            setattr(new, name, copied(buffer))
        return new


class WithoutPython(Row):
    """The same layers, by the function of the C library with arguments made beforehand, as others by a graph."""

    def __init__(self, layers: Layers) -> None:
        self.layers, self.bits, self.matrix = layers, layers.bits, layers.matrix

    def calls(self, x: Floats) -> Calls:
        from fips.kernels import cpu

        self.x = torch.from_numpy(x).bfloat16()
        self.y, self.rest = (self.x.new_empty(len(x), len(self.matrix)) for _ in range(2))
        layers: Any = self.layers.parts
        parts = [[cpu.Repeat(self.x, cpu.prepare(layer.packed()), None, 8) for layer in part] for part in layers]
        return [partial(self.multiply, part) for part in parts]

    def multiply(self, repeats: list[Any]) -> None:
        x, y, rest = self.x.data_ptr(), self.y.data_ptr(), self.rest.data_ptr()
        for repeat in repeats:
            repeat.run(*repeat.arguments, x, y)
            y = rest

    def product(self) -> Floats:
        return np.asarray(self.y.float())


def fips_rows(work: Work) -> Rows:
    for values in FIPS:
        layers = functools.cache(partial(Layers, work, values))
        yield values, layers
        yield f"{values}, without Python", lambda layers=layers: WithoutPython(layers())  # type: ignore[misc]


class _Parameters(ctypes.Structure):
    _fields_ = [("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool)]


GGML_FUNCTIONS: dict[str, tuple[Any, ...]] = {  # what they return and take
    "init": (c_void_p, _Parameters),
    "free": (None, c_void_p),
    "row_size": (c_size_t, c_int, c_int64),
    "quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "build_forward_expand": (None, c_void_p, c_void_p),
    "version": (c_char_p,),
    "backend_cpu_init": (c_void_p,),
    "backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "backend_cpu_reg": (c_void_p,),
    "backend_cpu_buffer_type": (c_void_p,),
    "backend_reg_dev_get": (c_void_p, c_void_p, c_size_t),
    "backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "backend_dev_supports_op": (c_bool, c_void_p, c_void_p),
    "backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "backend_buft_name": (c_char_p, c_void_p),
    "backend_buft_alloc_buffer": (c_void_p, c_void_p, c_size_t),
    "backend_buffer_get_base": (c_void_p, c_void_p),
    "backend_buffer_free": (None, c_void_p),
    "backend_tensor_alloc": (c_int, c_void_p, c_void_p, c_void_p),
    "backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "backend_graph_compute": (c_int, c_void_p, c_void_p),
}


class Ggml:
    """The functions of ggml by name, without the prefix, and its CPU backend."""

    def __init__(self, threads: int) -> None:
        package = importlib.util.find_spec("llama_cpp")
        if package is None or package.origin is None:
            raise ImportError("no llama_cpp here; name a Python that has it with --llama-python")
        libraries = [
            ctypes.CDLL(str(Path(package.origin).parent / "lib" / name), mode=ctypes.RTLD_GLOBAL)
            for name in ("libggml-base.so", "libggml-cpu.so")
        ]
        for name, (result, *arguments) in GGML_FUNCTIONS.items():
            function = next(f for one in libraries if (f := getattr(one, f"ggml_{name}", None)))
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.backend = self.backend_cpu_init()
        self.backend_cpu_set_n_threads(self.backend, threads)
        registry = self.backend_cpu_reg()
        self.device = self.backend_reg_dev_get(registry, 0)
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(self.device)
        self.buffer_types = [*itertools.takewhile(bool, extra), self.backend_cpu_buffer_type()]
        """In the order in which llama.cpp asks whether weights can lie there; only the last with ``--no-repack``."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def context(self) -> Any:
        return self.init(_Parameters(2**22, None, True))

    def buffer_type(self, kind: int, rows: int, cols: int) -> Any:
        """The first in which the CPU multiplies by such weights, as llama.cpp chooses it."""
        for one in self.buffer_types:
            weights, product = self.context(), self.context()
            weight = self.new_tensor_2d(weights, kind, cols, rows)
            buffer = self.backend_alloc_ctx_tensors_from_buft(weights, one)
            x = self.new_tensor_2d(product, 0, cols, 512)
            fits = self.backend_dev_supports_op(self.device, self.mul_mat(product, weight, x))
            self.backend_buffer_free(buffer)
            self.free(weights)
            self.free(product)
            if fits:
                return one
        raise ValueError(f"ggml cannot multiply by type {kind}")


class Graphs(Row):
    """Tensors of ggml, in graphs of one product for each matrix of a part, computed by its CPU backend."""

    def __init__(self, work: Work, ggml: Ggml, kind: int, where: Any) -> None:
        rows, cols = work.matrix.shape
        packed = np.empty(ggml.row_size(kind, cols) * rows, np.uint8)
        ggml.quantize_chunk(kind, work.matrix.ctypes.data, packed.ctypes.data, 0, rows, cols, None)
        self.ggml, self.matrix, self.bits = ggml, work.matrix, 8 * packed.nbytes / work.matrix.size
        self.held: list[tuple[Any, list[Any]]] = []
        context = ggml.context()
        self.parts = [
            [ggml.new_tensor_2d(context, kind, cols, rows) for _ in range(work.part)] for _ in work.parts(self.bits)
        ]
        self.held.append((context, [ggml.backend_alloc_ctx_tensors_from_buft(context, where)]))
        for weight in itertools.chain(*self.parts):
            ggml.backend_tensor_set(weight, packed.ctypes.data, 0, packed.nbytes)
        self.note = f"ggml {ggml.version().decode()}, buffer {ggml.backend_buft_name(where).decode()}"

    def calls(self, x: Floats) -> Calls:
        self._free(1)
        ggml, context, (tokens, cols) = self.ggml, self.ggml.context(), x.shape
        self.shape = (tokens, len(self.matrix))
        sizes = (x.nbytes, *(4 * math.prod(self.shape) for _ in range(2)))
        buffers = [ggml.backend_buft_alloc_buffer(ggml.backend_cpu_buffer_type(), size + 64) for size in sizes]
        self.held.append((context, buffers))
        inputs = ggml.new_tensor_2d(context, 0, cols, tokens)
        self._place(buffers[0], inputs)
        ggml.backend_tensor_set(inputs, x.ctypes.data, 0, x.nbytes)
        graphs = []
        for part in self.parts:
            graph = ggml.new_graph_custom(context, 4 * len(part), False)
            nodes = [ggml.mul_mat(context, weight, inputs) for weight in part]
            for index, node in enumerate(nodes):
                self._place(buffers[2 if index else 1], node)
                ggml.build_forward_expand(graph, node)
            graphs.append(graph)
            self.first = nodes[0]
        return [partial(self.compute, graph) for graph in graphs]

    def _place(self, buffer: Any, tensor: Any) -> None:
        self.ggml.backend_tensor_alloc(buffer, tensor, self.ggml.backend_buffer_get_base(buffer))

    def compute(self, graph: Any) -> None:
        status = self.ggml.backend_graph_compute(self.ggml.backend, graph)
        if status:
            raise RuntimeError(f"ggml computed a graph with status {status}")

    def product(self) -> Floats:
        y = np.empty(self.shape, np.float32)
        self.ggml.backend_tensor_get(self.first, y.ctypes.data, 0, y.nbytes)
        return y

    def _free(self, first: int) -> None:
        for context, buffers in self.held[first:]:
            for buffer in buffers:
                self.ggml.backend_buffer_free(buffer)
            self.ggml.free(context)
        del self.held[first:]

    def __del__(self) -> None:
        self._free(0)


def llama_rows(work: Work) -> Rows:
    ggml = Ggml(work.threads)
    for name, kind in GGML_TYPES.items():
        chosen, plain = ggml.buffer_type(kind, *work.matrix.shape), ggml.buffer_types[-1]
        yield name, partial(Graphs, work, ggml, kind, chosen)
        if chosen != plain:
            yield f"{name}, not repacked", partial(Graphs, work, ggml, kind, plain)


class Outputs(Row):
    """Rows whose graphs write into arrays that they are given: one for the first matrix, one for all others."""

    def outputs(self, tokens: int, part: int) -> list[Floats]:
        self.y, self.rest = (np.zeros((tokens, len(self.matrix)), np.float32) for _ in range(2))
        return [self.y, *[self.rest] * (part - 1)]

    def product(self) -> Floats:
        return self.y


class Sessions(Outputs):
    """ONNX Runtime's MatMulNBits with 8-bit inputs, a session for each part."""

    def __init__(self, work: Work, bits: int, group: int) -> None:
        self.matrix, self.part, self.bits = work.matrix, work.part, bits + 32 / group
        largest = (1 << (bits - 1)) - 1
        integers, scales = grouped(work.matrix, group, largest)
        codes = integers.astype(np.int16) + largest + 1  # that is 0 where there are no zero points
        stored = codes.astype(np.uint8) if bits == 8 else half_bytes(codes)
        model = self._model(stored, scales[..., 0], bits=bits, block_size=group)
        self.sessions = [self._session(model, work.threads) for _ in work.parts(self.bits)]

    def _model(self, stored: Bytes, scales: Floats, **settings: int) -> Any:
        from onnx import TensorProto, helper, numpy_helper

        rows, cols = self.matrix.shape
        tensors, nodes, outputs = [], [], []
        for index in range(self.part):
            weight, scale, y = f"weight{index}", f"scale{index}", f"y{index}"
            tensors.append(numpy_helper.from_array(np.roll(stored, index, 0), weight))
            tensors.append(numpy_helper.from_array(np.roll(scales, index, 0), scale))
            fields = {"domain": "com.microsoft", "K": cols, "N": rows, "accuracy_level": 4, **settings}
            nodes.append(helper.make_node("MatMulNBits", ["x", weight, scale], [y], **fields))
            outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, ["tokens", rows]))
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", cols])]
        graph = helper.make_graph(nodes, "products", inputs, outputs, tensors)
        versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()

    def _session(self, model: Any, threads: int) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.force_spinning_stop", "1")  # threads wait only while a graph runs
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def calls(self, x: Floats) -> Calls:
        self.x = x
        calls: Calls = []
        outputs = self.outputs(len(x), self.part)
        for session in self.sessions:
            binding = session.io_binding()
            binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
            for index, y in enumerate(outputs):
                binding.bind_output(f"y{index}", "cpu", 0, np.float32, y.shape, y.ctypes.data)
            calls.append(partial(session.run_with_iobinding, binding))
        return calls


def onnx_rows(work: Work) -> Rows:
    for bits, group in ONNX:
        yield f"{bits} bits, block {group}", partial(Sessions, work, bits, group)


class Requests(Outputs):
    """OpenVINO's compressed weights, a compiled model for each part; inputs are quantized as it does by default."""

    def __init__(self, work: Work, bits: int, group: int | None) -> None:
        self.openvino: Any = importlib.import_module("openvino")
        self.matrix, self.part, self.stored = work.matrix, work.part, list[Any]()
        group = group or work.matrix.shape[1]
        self.bits = bits + 16 / group
        integers, scales = grouped(work.matrix, group, (1 << (bits - 1)) - 1)
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": work.threads}
        core = self.openvino.Core()
        models = [
            core.compile_model(self._model(bits, integers, scales.astype(np.float16)), "CPU", settings)
            for _ in work.parts(self.bits)
        ]
        self.requests = [model.create_infer_request() for model in models]
        self.note = f"groups of {models[0].get_property('DYNAMIC_QUANTIZATION_GROUP_SIZE')} inputs"

    def _model(self, bits: int, integers: NDArray[np.int8], scales: NDArray[np.float16]) -> Any:
        ov, op = self.openvino, importlib.import_module("openvino.opset13")
        x, products = op.parameter([-1, self.matrix.shape[1]], np.float32), []
        for index in range(self.part):
            weight = np.roll(integers, index, 0)
            if bits == 4:
                self.stored.append(ov.Tensor(half_bytes(weight), ov.Shape(weight.shape), ov.Type.i4))
                constant = ov.op.Constant(self.stored[-1])  # borrows it
            else:
                constant = op.constant(weight)
            scaled = op.multiply(op.convert(constant, "f16"), op.constant(np.roll(scales, index, 0)))
            dense = op.convert(op.reshape(scaled, np.array(self.matrix.shape), False), "f32")
            products.append(op.result(op.matmul(x, dense, False, True)))
        return ov.Model(products, [x])

    def calls(self, x: Floats) -> Calls:
        self.x, outputs = x, self.outputs(len(x), self.part)
        for request in self.requests:
            request.set_input_tensor(self.openvino.Tensor(x, shared_memory=True))
            for index, y in enumerate(outputs):
                request.set_output_tensor(index, self.openvino.Tensor(y, shared_memory=True))
        return [request.infer for request in self.requests]


def openvino_rows(work: Work) -> Rows:
    for bits, group in OPENVINO:
        yield f"int{bits}, {f'group {group}' if group else 'channel'}", partial(Requests, work, bits, group)


class TorchInt4(Products):
    """What torchao's layers of 4-bit weights call on a CPU; a scale and a zero for each group."""

    def __init__(self, work: Work, group: int) -> None:
        self.matrix, self.bits = work.matrix, 4 + 32 / group
        integers, scales = grouped(work.matrix, group, 7)
        codes = torch.from_numpy(integers.reshape(work.matrix.shape) + 8).int()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scale = torch.from_numpy(scales[..., 0].T.copy())
        both = torch.stack([scale, torch.zeros_like(scale)], -1).bfloat16()
        self.parts = [
            [partial(self._product, group, packed.clone(), both.clone()) for _ in range(work.part)]
            for _ in work.parts(self.bits)
        ]

    @staticmethod
    def _product(group: int, packed: Any, both: Any, x: Any) -> Any:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, both)


class TorchDynamic(Products):
    """torch's own layers of 8-bit weights whose inputs are quantized in every call (``quantize_dynamic``)."""

    dtype = "float32"

    def __init__(self, work: Work) -> None:
        self.matrix, self.bits = work.matrix, 8 + 32 / work.matrix.shape[1]
        weight = torch.from_numpy(work.matrix)
        scales, zeros = weight.abs().amax(1) / 127, torch.zeros(len(weight), dtype=torch.long)
        quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        prepack = torch.ops.quantized.linear_prepack
        self.parts = [
            [partial(self._product, prepack(quantized, None)) for _ in range(work.part)] for _ in work.parts(self.bits)
        ]
        self.note = f"engine {torch.backends.quantized.engine}"

    @staticmethod
    def _product(packed: Any, x: Any) -> Any:
        return torch.ops.quantized.linear_dynamic(x, packed)


class TorchAo(Products):
    """torchao's layers of 8-bit weights and inputs, compiled together for all of a part, with frozen weights.

    Each has an argument of its own, though all are the same numbers: of one argument the compiler would round the
    inputs once for the whole part, which no layer of a model can do for those behind it.
    """

    def __init__(self, work: Work) -> None:
        quantization: Any = importlib.import_module("torchao.quantization")
        self.matrix, self.bits = work.matrix, 8 + 16 / work.matrix.shape[1]
        weight = torch.from_numpy(work.matrix).bfloat16()
        self.modules = []
        for _ in work.parts(self.bits):
            layers = [torch.nn.Linear(*weight.T.shape, bias=False, dtype=torch.bfloat16) for _ in range(work.part)]
            for index, layer in enumerate(layers):  # the compiler may merge weights that are equal
                layer.weight = torch.nn.Parameter(weight.roll(index, 0), requires_grad=False)
            self.modules.append(torch.nn.ModuleList(layers))
            quantization.quantize_(self.modules[-1], quantization.Int8DynamicActivationInt8WeightConfig())

    def calls(self, x: Floats) -> Calls:
        torch._dynamo.reset()  # gives back the weights frozen for other tokens
        torch._inductor.config.freezing = True
        self.parts = [[self._compiled(layers)] for layers in self.modules]
        return super().calls(x)

    def _compiled(self, layers: Any) -> Callable[[Any], Any]:
        products = torch.compile(partial(self._products, layers), dynamic=False)
        return lambda x: products(*(x.view_as(x) for _ in layers))

    @staticmethod
    def _products(layers: list[Any], *inputs: Any) -> list[Any]:
        return [layer(x) for layer, x in zip(layers, inputs, strict=True)]

    def product(self) -> Floats:
        return np.asarray(self.y[0].float())


def torch_rows(work: Work) -> Rows:
    for group in TORCH_GROUPS:
        yield f"int4, group {group}", partial(TorchInt4, work, group)
    yield "torch's int8", partial(TorchDynamic, work)
    yield "int8, compiled", partial(TorchAo, work)


LIBRARIES: dict[str, tuple[Callable[[Work], Rows], tuple[str, ...]]] = {
    "fips": (fips_rows, ("fips", "torch")),
    "llama.cpp": (llama_rows, ("llama-cpp-python",)),
    "ONNX Runtime": (onnx_rows, ("onnxruntime",)),
    "OpenVINO": (openvino_rows, ("openvino",)),
    "torchao": (torch_rows, ("torchao", "torch")),
}
"""What makes the rows of a library, and the packages it consists of."""


def why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class Worker:
    """The rows of one library; its methods are what it is asked for."""

    def __init__(self, library: str, *, part: int, megabytes: float, threads: int) -> None:
        self.make, packages = LIBRARIES[library]
        self.part, self.megabytes, self.threads = part, megabytes, threads
        self.rows: dict[str, Row] = {}
        self.prepared: dict[str, deque[Callable[[], object]]] = {}
        self.versions = {name: version(name) for name in packages}

    def about(self) -> dict[str, Any]:
        return {"versions": self.versions}

    def shape(self, rows: int, cols: int) -> dict[str, dict[str, Any]]:
        """Makes all rows anew; answers with what they are, or why one is not."""
        self.prepared, self.rows = {}, {}
        gc.collect()
        matrix = np.random.default_rng(0).standard_normal((rows, cols), dtype=np.float32)
        work = Work(matrix=matrix, part=self.part, megabytes=self.megabytes, threads=self.threads)
        found: dict[str, dict[str, Any]] = {}
        for name, make in self.make(work):
            try:
                row = self.rows[name] = make()
                found[name] = {"bits": row.bits, "copies": self.part * len(work.parts(row.bits)), "note": row.note}
            except Exception as error:
                found[name] = {"failed": why(error)}
        return found

    def tokens(self, count: int) -> dict[str, float | str]:
        """Multiplies once by all copies; answers with the relative errors of products, or why there is none."""
        self.prepared, found = {}, dict[str, float | str]()
        for name, row in self.rows.items():
            x = np.random.default_rng(1).standard_normal((count, row.matrix.shape[1]), dtype=np.float32)
            try:
                calls = row.calls(x)
                for call in calls:
                    call()
                if calls:
                    expected = x[:4] @ row.matrix.T
                    found[name] = float(np.linalg.norm(row.product()[:4] - expected) / np.linalg.norm(expected))
                    self.prepared[name] = deque(calls)
            except Exception as error:
                found[name] = why(error)
        return found

    def time(self, name: str, parts: int | None) -> float:
        """Seconds of one product, while so many parts are visited, or all, none of them twice.

        What was visited last is computed before, uncounted, until a thread that woke on the core of another has moved.
        """
        calls = self.prepared[name]
        began = time.perf_counter()
        while time.perf_counter() - began < WARM_S:
            calls[-1]()
        now = list(calls)[:parts]
        calls.rotate(-len(now))
        started = time.perf_counter()
        for call in now:
            call()
        return (time.perf_counter() - started) / (len(now) * self.part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--part", type=int, required=True)
    parser.add_argument("--megabytes", type=float, required=True)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if torch is not None:
        torch.set_num_threads(args.threads)
    try:
        worker = Worker(args.library, part=args.part, megabytes=args.megabytes, threads=args.threads)
    except ImportError as error:  # so is a package without a version
        print(json.dumps({"failed": why(error)}), file=answers, flush=True)
        return
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, what)(*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()
