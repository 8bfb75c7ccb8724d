"""The header of a torch `.pth` file: its pickle is walked, never run. No torch; no tensor is read.

A `.pth` is a zip file whose `data.pkl` builds a dict of tensors. The few instructions and callables that this takes are
known here; any other is code, and the file is refused. Its tensors lie in the zip file as they are, and are read from
there: nothing ever runs the pickle.
Format: https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from wan_local.errors import CorruptModel
from wan_local.header import ITEM_BYTES, FileStamp, Header, TensorInfo

_MAX_BYTES = 32 * 2**20  # of the pickle, and of the zip file's directory; UMT5-XXL has 0.1 MB
_LOCAL_HEADER_BYTES = 30  # of a zip file's entry; its name and an extra field follow
_UNTYPED = ""
_STORAGES = {
    "torch DoubleStorage": "F64", "torch FloatStorage": "F32", "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16", "torch LongStorage": "I64", "torch IntStorage": "I32",
    "torch ShortStorage": "I16", "torch CharStorage": "I8", "torch ByteStorage": "U8", "torch BoolStorage": "BOOL",
    "torch.storage UntypedStorage": _UNTYPED,
}  # fmt: skip
_DTYPES = {  # whose tensors lie in untyped storages
    "torch float8_e4m3fn": "F8_E4M3", "torch float8_e5m2": "F8_E5M2", "torch float8_e8m0fnu": "F8_E8M0",
    "torch uint16": "U16", "torch uint32": "U32", "torch uint64": "U64",
}  # fmt: skip
_ORDERED, _PARAMETER = "collections OrderedDict", "torch._utils _rebuild_parameter"
_TYPED_TENSOR, _UNTYPED_TENSOR = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"
_KNOWN = {_ORDERED, _PARAMETER, _TYPED_TENSOR, _UNTYPED_TENSOR, *_STORAGES, *_DTYPES}
_PUSH = ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_WRAPPERS = ("state_dict", "model", "model_state")


class _Mark:
    """The MARK of the pickle machine."""


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str  # _UNTYPED: its tensors say
    key: str


@dataclass(frozen=True, slots=True)
class _Tensor:
    dtype: str
    key: str  # of its storage
    first: int  # item of the storage
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None  # None: row by row


def read_pickle_header(file: Path) -> Header:
    """Return the tensors of a torch zip file; CorruptModel if it is damaged, holds code, or no dict of tensors."""
    try:
        _check_directory(file)
        with zipfile.ZipFile(file) as archive:
            members = {entry.filename: entry for entry in archive.infolist()}
            pickles = [name for name in members if name.endswith("/data.pkl") or name == "data.pkl"]
            if len(pickles) != 1:
                raise CorruptModel(f"{file.name!r} is a zip file without torch's data.pkl, not weights.")
            with archive.open(pickles[0]) as stream:
                content = stream.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise CorruptModel(f"{file.name!r} has a pickle of more than {_MAX_BYTES} bytes, which no weights need.")
        prefix = pickles[0].removesuffix("data.pkl")
        storages = {name.removeprefix(f"{prefix}data/"): entry for name, entry in members.items()}
        return Header("pickle", _tensors_of(file, _run(file, content), storages), {})
    except (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise CorruptModel(f"{file.name!r} is cut short or damaged: {error}. Download it again.") from error


def _unwrapped(table: Any) -> Any:
    """Return the dict of tensors itself where a training script has wrapped it."""
    for name in _WRAPPERS:
        if isinstance(table, dict) and isinstance(table.get(name), dict):
            return table[name]
    return table


def _check_directory(file: Path) -> None:
    """Refuse a zip directory of a forged length before the zip library allocates it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        tail_start = max(0, size - 65_557)  # the end record and the longest comment
        stream.seek(tail_start)
        tail = stream.read()
        end = tail.rfind(b"PK\x05\x06")
        if end < 0:
            raise zipfile.BadZipFile("its end, with the list of its contents, is missing")
        (length,) = struct.unpack_from("<I", tail, end + 12)
        if length == 2**32 - 1:  # zip64: the true length is in a record that the locator points to
            (place,) = struct.unpack_from("<Q", tail, end - 20 + 8)
            stream.seek(min(place, size))
            (length,) = struct.unpack_from("<Q", stream.read(56), 40)
    if length > min(_MAX_BYTES, size):
        raise zipfile.BadZipFile(f"a list of contents of {length} bytes is announced")


def _tensors_of(file: Path, table: Any, storages: dict[str, zipfile.ZipInfo]) -> dict[str, TensorInfo]:
    table = _unwrapped(table)
    if not isinstance(table, dict) or not table:
        raise CorruptModel(f"{file.name!r} holds no dict of tensors.")
    tensors = {}
    with file.open("rb") as stream:
        stamp = FileStamp.of(stream.fileno())
        for name, value in table.items():
            if not isinstance(name, str) or not isinstance(value, _Tensor):
                what = type(value).__name__
                raise CorruptModel(f"{file.name!r} is no dict of tensors: {str(name)[:60]!r} is a {what}.")
            item, count, storage = ITEM_BYTES[value.dtype], math.prod(value.shape), storages.get(value.key)
            info = TensorInfo(value.dtype, value.shape, file, count * item, 0, stamp, value.strides)
            needed, have = (value.first + max(count, info.span)) * item, storage.file_size if storage else 0
            if storage is None or needed > have:
                raise CorruptModel(f"{name!r} in {file.name!r} needs {needed} bytes and has {have}. Download it again.")
            tensors[name] = replace(info, offset=_data_start(stream, storage) + value.first * item)
            if tensors[name].offset + info.span * item > stamp.nbytes:
                raise zipfile.BadZipFile(f"{name!r} would reach beyond its end")
    return tensors


def _data_start(stream: BinaryIO, storage: zipfile.ZipInfo) -> int:
    """Return where a storage's bytes begin in the file, after a header of their own."""
    if storage.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"{storage.filename!r} is compressed, as torch never writes it")
    stream.seek(storage.header_offset)
    header = stream.read(_LOCAL_HEADER_BYTES)
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"{storage.filename!r} is not where its list of contents says")
    lengths: tuple[int, int] = struct.unpack_from("<HH", header, _LOCAL_HEADER_BYTES - 4)  # of name and extra field
    return storage.header_offset + _LOCAL_HEADER_BYTES + sum(lengths)


def _run(file: Path, content: bytes) -> Any:
    """Walk the pickle with a machine that knows dicts, numbers and tensors, and nothing that runs."""
    machine = _Machine()
    try:
        for operation, argument, _ in pickletools.genops(content):
            if operation.name == "STOP":
                return machine.stack.pop()
            machine.step(operation.name, argument)
    except _Code as error:
        raise CorruptModel(
            f"{file.name!r} holds code ({error}), not only tensors, and was not opened. Get the weights from their "
            "own publisher, as .safetensors if there are."
        ) from error
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CorruptModel(f"the pickle in {file.name!r} is damaged: {error}. Download it again.") from error
    raise CorruptModel(f"the pickle in {file.name!r} has no end. Download it again.")


class _Code(Exception):
    """The pickle asks for something to be run."""


class _Machine:
    """Stack and memo of a pickle of tensors."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        if name in _PUSH:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "GLOBAL":
            self._push_global(argument)
        elif name == "STACK_GLOBAL":
            self._push_global(" ".join([self.stack.pop(-2), self.stack.pop()]))
        elif name == "BINPERSID":
            self._push_storage(self.stack.pop())
        elif name == "REDUCE":
            self._reduce()
        elif name == "BUILD":  # an OrderedDict's attributes: the versions of a module's state
            self.stack.pop()
        else:
            self._collect(name)

    def _collect(self, name: str) -> None:
        """Do the instructions that make tuples, lists and dicts of what lies on the stack."""
        stack = self.stack
        empty: dict[str, Any] = {"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": (), "MARK": _Mark()}
        if name in empty:
            stack.append(empty[name])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            items = self._to_mark()
            stack.append(tuple(items))
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._to_mark()
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._to_mark()
            stack[-1].extend(items)
        else:
            raise _Code(f"instruction {name}")

    def _to_mark(self) -> list[Any]:
        place = max(index for index, item in enumerate(self.stack) if isinstance(item, _Mark))
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def _push_global(self, name: str) -> None:
        if name not in _KNOWN:
            raise _Code(name.replace(" ", "."))
        self.stack.append(_Global(name))

    def _push_storage(self, identity: Any) -> None:
        kind, storage, key, _, _ = identity
        if kind != "storage" or not isinstance(storage, _Global):
            raise ValueError(f"a persistent object of kind {kind!r}")
        self.stack.append(_Storage(_STORAGES[storage.name], str(key)))

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global):
            raise _Code("a call of something unknown")
        if function.name == _ORDERED:
            result: Any = dict(*arguments)
        elif function.name == _PARAMETER:
            result = arguments[0]
        elif function.name == _TYPED_TENSOR:
            result = _tensor(arguments[0].dtype, *arguments[:4])
        elif function.name == _UNTYPED_TENSOR:
            result = _tensor(_DTYPES[arguments[6].name], *arguments[:4])
        else:
            raise _Code(function.name.replace(" ", "."))
        self.stack.append(result)


def _tensor(dtype: str, storage: Any, first: Any, shape: Any, strides: Any) -> _Tensor:
    """Return a tensor after checking that it can be one."""
    sizes = (first, *shape, *strides)
    known = isinstance(storage, _Storage) and dtype in ITEM_BYTES
    if not known or any(type(n) is not int or not 0 <= n < 2**63 for n in sizes):
        raise ValueError(f"a tensor of shape {str(sizes)[:100]}")
    step, row_by_row = 1, True
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        row_by_row &= length == 1 or stride == step  # the stride of a single item means nothing
        step *= length
    return _Tensor(dtype, storage.key, first, tuple(shape), None if row_by_row or step == 0 else tuple(strides))
