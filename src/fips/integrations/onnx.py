"""ONNX files of packed models: blocks of few bits that ONNX Runtime multiplies by, or constants that the graph decodes.

The decoding reads constants only, so ONNX Runtime does it once, when it loads the file; what then runs is dense. Every
basis is stored once.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers import PreTrainedModel

from fips.errors import ModelError
from fips.formats.packed import in_place
from fips.formats.patterns import BITMASK, FULL, pattern_named
from fips.formats.rotation import rotate
from fips.integrations.matmul_nbits import BlockedLinear, block_bits
from fips.layers.embedding import Lookup, PackedEmbedding, TiedLayer, tied_layers
from fips.layers.linear import FactoredLinear, factored_layers, replace_everywhere
from fips.optional import require

__all__ = ["OnnxFile", "export_onnx"]

TOLERANCE = 1e-4
"""Largest accepted relative error of ONNX Runtime against torch, Frobenius norm, both in float32."""
ROUNDED_TOLERANCE = 0.1
"""The same where ONNX Runtime rounds inputs of layers to 8 bits, which torch does not."""
_FOLD_LIMIT = 64  # elements; larger constants stay as they are, so that packed factors stay packed
_DYNAMIC = {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")}


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """What ``export_onnx`` wrote and measured."""

    path: Path
    bytes: int
    opset: int
    relative_error: float
    """ONNX Runtime against torch on the inputs given, Frobenius norm."""
    blocked: int
    """Layers that run as blocks of few bits (``MatMulNBits``)."""
    decoded: int
    """Packed layers that are decoded to float32 when the file is loaded."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What becomes of the packed layers, for people."""
        found = []
        if self.blocked:
            found.append(f"{self.blocked} packed layers run as blocks of 4 or 8 bits (MatMulNBits of ONNX Runtime)")
        if self.decoded:
            found.append(f"{self.decoded} packed layers become float32 in memory when ONNX Runtime loads the file")
        return tuple(found)


def export_onnx(
    model: PreTrainedModel, path: Path, inputs: Mapping[str, Tensor], *, activation_bits: int | None = None
) -> OnnxFile:
    """Write an ONNX file with dynamic batch and sequence sizes, run it on ``inputs`` and compare with torch.

    Layers of integers of at most 4 bits, without pruned entries, become ``MatMulNBits`` of ONNX Runtime with the same
    integers; with ``activation_bits=8`` all integers and levels do, and inputs are rounded to 8 bits there (None: as
    each layer says, 16: never). All other numbers keep the type they are stored in, patterns become bitmasks, and the
    graph decodes them. Arithmetic is float32. Of the outputs the first is exported (logits, or the last hidden state).
    The model is left as it is. Raises ``ModelError`` if the model cannot be exported or ONNX Runtime disagrees,
    ``MissingPackageError`` without onnx, onnxscript and onnxruntime.
    """
    for package in ("onnx", "onnxscript.optimizer", "onnxruntime"):
        require(package, extra="onnx", purpose="export to ONNX")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"`{type(model).__name__}` is an encoder-decoder, which has no single ONNX graph")
    inputs = {
        name: tensor if tensor.shape[0] > 1 else tensor.repeat_interleave(2, 0) for name, tensor in inputs.items()
    }
    twin = _exportable(model, activation_bits)
    wrapper = _FirstOutput(twin, tuple(inputs))  # a batch of one would be taken for a constant
    with torch.no_grad():
        expected = wrapper(*inputs.values())
        program = _trace(wrapper.eval(), inputs)
    _tidy(program.model)
    program.save(str(path))
    error = _relative_error(_run(path, inputs), expected)
    decoded = sum(isinstance(module, _DecodedLinear) for module in twin.modules())
    blocked = [module for module in twin.modules() if isinstance(module, BlockedLinear)]
    allowed = ROUNDED_TOLERANCE if any(layer.rounds for layer in blocked) else TOLERANCE
    if not error <= allowed:
        raise ModelError(f"ONNX Runtime differs from torch by {error:.1e} (relative), allowed is {allowed:.0e}")
    files = [path, path.with_name(path.name + ".data")]
    size = sum(file.stat().st_size for file in files if file.is_file())
    opset = int(program.model.opset_imports[""])
    return OnnxFile(path, size, opset, error, len(blocked), decoded)


class _FirstOutput(nn.Module):
    """A model as a function of positional tensors that returns one tensor."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self._names = names

    def forward(self, *tensors: Tensor) -> Tensor:
        result: Tensor = self.model(**dict(zip(self._names, tensors, strict=True)), return_dict=True)[0]
        return result


class _DecodedLinear(nn.Module):
    """A packed layer whose decoding uses operations that ONNX has: integer division and cumulative sums."""

    def __init__(self, layer: FactoredLinear) -> None:
        super().__init__()
        self._lookup = layer.lookup if isinstance(layer, PackedEmbedding) else None
        self._borrowed = (layer.basis,)
        self._up, self._shape = layer.reads_stream, layer.factor_shape
        self.bias = layer.bias
        self.weight = torch.empty(0)
        self._rotation = layer.rotation
        matrix = in_place(layer.packed()).detach()
        if layer.value_format.scaled:  # levels and coded values are integers too
            matrix = layer.value_format.decode(matrix).to(torch.int8)
        if layer.fmt == FULL:
            self.register_buffer("values", matrix)
        else:
            values, pattern = pattern_named(BITMASK).pack(matrix, layer.mask())
            self.register_buffer("values", values)
            self.register_buffer("pattern", pattern)
        if layer.value_format.scaled:
            self.register_buffer("scales", layer.scales)
            if layer.value_format.scale_group is not None:
                self._group = layer.value_format.scale_group
                self.register_buffer("group_scales", layer.group_scales)

    def _entries(self) -> Tensor:
        """The numbers of the matrix, without their scales."""
        values = self.get_buffer("values").float()
        if "pattern" not in self._buffers:
            return values
        powers = 2 ** torch.arange(8, dtype=torch.int32)
        bytes_ = self.get_buffer("pattern").to(torch.int32).unsqueeze(1)
        count = self._shape[0] * self._shape[1]
        bits = (torch.div(bytes_, powers, rounding_mode="floor") % 2).flatten()[:count]
        places = (bits.cumsum(0) - 1).clamp(min=0)
        return torch.where(bits == 1, values[places], torch.zeros(())).view(self._shape)

    def _factor(self) -> Tensor:
        factor = self._entries()
        if "scales" not in self._buffers:
            return factor
        if "group_scales" in self._buffers:
            rows, cols = self._shape
            groups = self.get_buffer("group_scales").float().view(rows, -1, 1)
            factor = factor * groups.expand(-1, -1, self._group).reshape(rows, -1)[:, :cols]
        return rotate(factor * self.get_buffer("scales").float().unsqueeze(1), self._rotation)

    def rows(self, ids: Tensor, lookup: Lookup) -> Tensor:
        """Rows of the matrix of an embedding."""
        return lookup.scaled(embedding(ids, self._factor()), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        if self._lookup is not None and not x.is_floating_point():
            return self.rows(x, self._lookup)
        (basis,) = self._borrowed
        if basis is None:
            return linear(x, self._factor(), self.bias)
        if self._up:
            return linear(basis(x), self._factor(), self.bias)
        y: Tensor = basis(linear(x, self._factor()), expand=True)
        return y if self.bias is None else y + self.bias


class _DecodedTied(nn.Module):
    """Another place of the matrix of a packed embedding."""

    def __init__(self, owner: _DecodedLinear, layer: TiedLayer) -> None:
        super().__init__()
        self._borrowed, self._lookup, self.bias = (owner,), layer.lookup, layer.bias
        self.weight = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        (owner,) = self._borrowed
        if self._lookup is not None:
            return owner.rows(x, self._lookup)
        y: Tensor = owner(x)
        return y if self.bias is None else y + self.bias


def _exportable(model: PreTrainedModel, activation_bits: int | None) -> PreTrainedModel:
    """A copy on the CPU, in float32 but for the packed values, without key-value cache."""
    twin: PreTrainedModel = copy.deepcopy(model).cpu().eval()
    made = {id(layer): _replacement(layer, activation_bits) for layer in factored_layers(twin).values()}
    for name, place in tied_layers(twin).items():
        owner = made[id(place.embedding)]
        assert isinstance(owner, _DecodedLinear)
        replace_everywhere(twin, name, _DecodedTied(owner, place))
    for name, layer in factored_layers(twin).items():
        replace_everywhere(twin, name, made[id(layer)])
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in twin.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and not isinstance(module, _DecodedLinear | BlockedLinear):
                module._buffers[name] = buffer.float()
    twin.config.use_cache = False
    return twin


def _replacement(layer: FactoredLinear, activation_bits: int | None) -> _DecodedLinear | BlockedLinear:
    rounded = (activation_bits or layer.runtime.activation_bits) == 8
    bits = None if isinstance(layer, PackedEmbedding) else block_bits(layer, rounded=rounded)
    return _DecodedLinear(layer) if bits is None else BlockedLinear(layer, bits, rounded=rounded)


def _trace(wrapper: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    dims = {name: torch.export.Dim(name) for name in ("batch", "sequence")}
    shapes = tuple({axis: dims[dim] for axis, dim in enumerate(_DYNAMIC.get(name, ("batch",)))} for name in inputs)
    try:
        with _quiet():
            return torch.onnx.export(
                wrapper,
                tuple(inputs.values()),
                dynamo=True,
                dynamic_shapes=(shapes,),
                optimize=False,
                input_names=list(inputs),
                output_names=["output"],
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ModelError(f"torch cannot export this model to ONNX: {str(error).splitlines()[0]}") from None


def _tidy(graph_model: Any) -> None:
    """Simplify the graph without unpacking its constants, and drop stack traces."""
    optimizer = require("onnxscript.optimizer", extra="onnx", purpose="export to ONNX")
    with _quiet():
        optimizer.optimize_ir(graph_model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT)
    for node in graph_model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None


def _run(path: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    runtime = require("onnxruntime", extra="onnx", purpose="export to ONNX")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(output)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs every operation it registers and warns of its own deprecations."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
