"""What a checkpoint holds comes back equal and of the same type; what it cannot hold, and bad files, are refused."""

from __future__ import annotations

import enum
import hashlib
import json
import math
import random
from collections import Counter, OrderedDict, defaultdict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn

import mlo
from mlo.training import checkpoint, tree

DTYPES = [dtype for name, dtype in tree.DTYPES.items() if not name.startswith(("q", "bits", "float4"))]


def back(tmp_path, value):
    checkpoint.save(tmp_path / "c.pt", {"value": value})
    return checkpoint.load(tmp_path / "c.pt")["value"]


def same(one, other):
    """Whether two values are equal and of the same types throughout; NaN equals NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        about = [(t.dtype, t.shape, t.stride(), t.requires_grad) for t in (one, other)]
        raw = [
            t.detach().contiguous().reshape(-1).view(torch.uint8) if t.numel() else torch.ones(1) for t in (one, other)
        ]
        return about[0] == about[1] and torch.equal(*raw)
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return getattr(one, "_metadata", None) == getattr(other, "_metadata", None) and same(
            [*one.items()], [*other.items()]
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other or (one != one and other != other)


def module_state():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    return module.state_dict()


def optimizer_state():
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([{"params": [layer.weight], "lr": 1e-3}, {"params": [layer.bias]}], amsgrad=True)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


VALUES = {
    "none and booleans": [None, True, False, 0, 1],
    "integers": [2**63 - 1, -(2**63), 2**63, -(2**200), 10**5000 % 7**4000],
    "floats": [0.1, -0.0, 5e-324, math.inf, -math.inf, math.nan, 1e308, 1.0],
    "complex": [1 + 2j, complex(math.inf, -0.0)],
    "text": ["", "é\n\0", "\ud800", "tensor", b"", b"\xff\0"],
    "lists and tuples": ([], (), [()], ([1, (2,)], (3, [4])), ["list", 1], ("tensor",)),
    "sets": [{1, "a"}, frozenset({(1, 2)}), set()],
    "keys": {1: "a", "1": "b", (1, "x"): None, None: 0, False: {}, 2.5: []},
    "mappings": [OrderedDict(b=1, a=2), Counter("abca"), {}],
    "torch": [torch.float16, torch.device("cuda:1"), torch.Size([2, 3])],
    "numpy": [
        np.float64(0.1),
        np.int8(3),
        np.bool_(True),
        np.str_(""),
        np.datetime64("2020-01-01"),
        np.longdouble(1) / 3,
    ],
    "arrays": [np.arange(6.0).reshape(2, 3).T, np.zeros((0, 3), np.float16), np.array(5), np.array(["a", "bc"])],
    "python's random state": random.Random(3).getstate(),
    "numpy's random state": np.random.RandomState(3).get_state(),
    "torch's random state": torch.Generator().manual_seed(3).get_state(),
    "a module": module_state(),
    "an optimizer": optimizer_state(),
    "views": [
        torch.arange(12.0).view(3, 4)[1:, ::2],
        torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    ],
    "parameters": [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), False), torch.ones(1, requires_grad=True)],
    "conjugate and negative": [torch.tensor([1 + 2j]).conj().resolve_conj(), torch.ones(0), torch.ones(2, 0, 3)],
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back_equal_and_of_the_same_type(tmp_path, name):
    assert same(VALUES[name], back(tmp_path, VALUES[name]))


@pytest.mark.filterwarnings("ignore:.*support is experimental")
def test_tensors_of_every_dtype(tmp_path):
    assert {torch.bfloat16, torch.complex64, torch.bool, torch.uint64, torch.float8_e4m3fn} <= set(DTYPES)
    raw = torch.arange(48, dtype=torch.uint8) % 2
    for dtype in DTYPES:
        several, one = raw.view(dtype), raw.view(dtype)[0]
        assert same([several, one, several[:0]], back(tmp_path, [several, one, several[:0]])), dtype


def test_nan_payloads_and_negative_zeros_are_kept_in_tensors(tmp_path):
    bits = torch.tensor([0x7FC00001, -(2**31), 0x7F800000], dtype=torch.int32)
    assert torch.equal(back(tmp_path, bits.view(torch.float32)).view(torch.int32), bits)


def test_tensors_that_share_a_storage_still_do(tmp_path):
    base = torch.arange(100.0)
    whole, part, tied, own = back(tmp_path, [base[10:50], base[20:30], base[20:30], torch.arange(10.0)])
    whole[10] = -1
    assert part[0] == tied[0] == -1
    assert own[0] == 0
    assert whole.untyped_storage().nbytes() < base.untyped_storage().nbytes()


def test_tensors_of_different_sizes_may_share_a_storage(tmp_path):
    base = torch.arange(8.0, dtype=torch.float64)
    halves, whole = back(tmp_path, [base.view(torch.float32)[5:9], base[3:]])
    assert torch.equal(halves, base.view(torch.float32)[5:9])
    assert torch.equal(whole, base[3:])


def test_expanded_and_conjugated_tensors_are_written_out(tmp_path):
    for tensor in (torch.ones(1).expand(5), torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j]).conj().imag):
        found = back(tmp_path, tensor)
        assert torch.equal(found, tensor)
        found[0] = 3


class Color(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (object(), "builtins.object"),
        (Color.RED, "Color"),
        (namedtuple("Pair", "a b")(1, 2), "Pair"),
        (defaultdict(list), "defaultdict"),
        (len, "builtin_function"),
        (np.array([None]), "ndarray"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.ones(2, device="meta"), "meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_checkpoint_cannot_hold_is_refused_by_its_place(tmp_path, value, named):
    checkpoint.save(tmp_path / "c.pt", {"a": 1})
    with pytest.raises(mlo.CheckpointError, match=rf"the state\['a'\]\[1\] is a .*{named}"):
        checkpoint.save(tmp_path / "c.pt", {"a": [0, value]})
    assert checkpoint.load(tmp_path / "c.pt") == {"a": 1}


def test_a_state_that_contains_itself_is_refused(tmp_path):
    state: dict = {}
    state["again"] = state
    with pytest.raises(mlo.CheckpointError, match="nested too deeply, or contains itself"):
        checkpoint.save(tmp_path / "c.pt", state)


def test_any_flipped_bit_and_any_cut_are_found(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"a": torch.arange(9), "b": [1, "x", None]}, {"run": "r"})
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        with pytest.raises(mlo.CheckpointError, match="this file is not a readable checkpoint"):
            checkpoint.load(path, {"run": "r"})
        path.write_bytes(whole[:at])
        with pytest.raises(mlo.CheckpointError, match="this file is not a readable checkpoint"):
            checkpoint.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(mlo.CheckpointError, match="this file is not a readable checkpoint"):
        checkpoint.load(path)


def sealed(header: bytes, content: bytes = b"") -> bytes:
    """A file with a right digest around whatever it holds."""
    file = checkpoint.FORMAT + len(header).to_bytes(8, "little") + header + content
    return file + hashlib.blake2b(file, digest_size=checkpoint.DIGEST_SIZE).digest()


def header(state: object, storages: list = (), **other: object) -> bytes:
    return json.dumps({"storages": [*storages], "identity": ["dict"], "state": state, **other}).encode()


def of_tensor(*words: object) -> list:
    return ["dict", "x", ["tensor", *words]]


@pytest.mark.parametrize(
    "content",
    {
        "an empty header": b"",
        "a number": b"5",
        "no parts": b"{}",
        "open lists": b"[" * 100_000,
        "many lists": header(["dict"]) + b" " + b"[]," * 3_000_000,
        "digits": header(["dict", "x", 1]).replace(b"1", b"1" * 5000),
        "not a mapping": header(["list"]),
        "an unknown kind": header(["dict", "x", ["eval", "1"]]),
        "an object": header(["dict", "x", {"a": 1}]),
        "a key that is a list": header(["dict", ["list"], 1]),
        "a key without a value": header(["dict", "x"]),
        "a wrong kind of kind": header(["dict", "x", [["list"], 1]]),
        "a list without a kind": header(["dict", "x", []]),
        "a large storage": header(["dict"], [2**40]),
        "a negative storage": header(["dict"], [-1, 1]),
        "storages of text": header(["dict"], ["1"]),
        "a large tensor": header(of_tensor("float32", [10**9], [1], 0, 0, False, False), [16]),
        "a large tensor of one element": header(of_tensor("float32", [10**9], [0], 0, 0, False, False), [16]),
        "a tensor before its storage": header(of_tensor("float32", [1], [1], 0, -4, False, False), [16]),
        "a tensor of no dtype": header(of_tensor("load", [1], [1], 0, 0, False, False), [16]),
        "a tensor of no storage": header(of_tensor("float32", [1], [1], 3, 0, False, False), [16]),
        "an array of objects": header(
            ["dict", "x", ["array", "|O8", [2], ["tensor", "uint8", [16], [1], 0, 0, 0, 0]]], [16]
        ),
        "a large array": header(
            ["dict", "x", ["array", "<f8", [2**40], ["tensor", "uint8", [16], [1], 0, 0, 0, 0]]], [16]
        ),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_file_that_mlo_did_not_write_is_refused_whatever_its_digest(tmp_path, content):
    path = tmp_path / "c.pt"
    path.write_bytes(sealed(content[1], bytes(16) if b"[16]" in content[1] else b""))
    with pytest.raises(mlo.CheckpointError, match="this file is not a readable checkpoint"):
        checkpoint.load(path)


def test_a_header_that_warrants_too_much_memory_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "c.pt").write_bytes(
        sealed(header(["dict", "x", ["list", 0]]).replace(b"0]", b'["list"],' * 1_300_000 + b"0]"))
    )
    with pytest.raises(mlo.CheckpointError, match="more memory than its"):
        checkpoint.load(tmp_path / "c.pt")
    with pytest.raises(mlo.CheckpointError, match="keep long lists of numbers as tensors"):
        checkpoint.save(tmp_path / "d.pt", {"x": [0] * 700_000})


def test_a_checkpoint_of_torch_is_refused_with_the_way_to_convert_it(tmp_path):
    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    torch.save({"x": torch.ones(2)}, old)
    with pytest.raises(
        mlo.CheckpointError, match=r"mlo\.checkpoint\.save\(NEW, torch\.load\(OLD, weights_only=True\)\)"
    ):
        checkpoint.load(old)
    checkpoint.save(new, torch.load(old, weights_only=True))
    assert torch.equal(checkpoint.load(new)["x"], torch.ones(2))


def test_the_identity_is_verified(tmp_path):
    checkpoint.save(tmp_path / "c.pt", {"x": 1}, {"run": "a", "seed": 3})
    assert checkpoint.load(tmp_path / "c.pt") == checkpoint.load(tmp_path / "c.pt", {"run": "a", "seed": 3}) == {"x": 1}
    for identity, message in (
        ({"seed": 4}, "another seed: 3, and not 4"),
        ({"stage": "s"}, "stage: None, and not 's'"),
    ):
        with pytest.raises(mlo.CheckpointError, match=message):
            checkpoint.load(tmp_path / "c.pt", identity)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(mlo.CheckpointError, match="this is not a file"):
        checkpoint.load(tmp_path)
    with pytest.raises(mlo.CheckpointError, match="this is not a file"):
        checkpoint.load("/dev/zero")
