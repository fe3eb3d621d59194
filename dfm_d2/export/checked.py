"""A copy of a pt2 file that runs no code while it is loaded.

``torch.export.load`` unpickles sample inputs and old weights, evaluates sizes as Python, puts names into a
program that it writes and runs, takes any function below torch for an operator, and imports what the inputs'
tree names. Needs torch and torchvision alone: the example takes this file without the rest of dfm_d2.
"""

import io
import json
import operator
import pickle
import re
import zipfile
from typing import Any

import torch
import torchvision  # noqa: F401  (registers torchvision::nms)

# Members of a file: no script or opaque constants, no compiled code. Torch 2.8 pickles weights as model.pt.
_SAMPLES = "data/sample_inputs/model.pt"
_MEMBERS = (
    rf"archive_format|archive_version|byteorder|\.data/[a-z_]+|models/model\.json|{_SAMPLES}|extra/dfm_d2\.json"
    r"|data/(weights/weight|constants/tensor)_[0-9]+|data/(weights|constants)/model(\.pt|_\2_config\.json)"
)
# The text that may stand at a key of the JSON; at other keys it is a dotted name.
_OPERATOR = (  # but those of aten that open files
    r"torch\.ops\.(aten|torchvision)\.(?!from_file\.|save\.)\w+\.\w+|torch\.sym_(float|int|ite|max|min|not)"
    r"|math\.trunc|_operator\.(add|and_|eq|floordiv|ge|getitem|gt|le|lt|mod|mul|ne|neg|or_|pos|sub|truediv)"
)
_TREE = r'([][{}:, 0-9]|null|"(type|context|children_spec|null|builtins\.[a-z]+)"|"\[(\\"\w+\\"(, )?)*\]")*'
_SYMBOL = r"Symbol\('[a-z]+[0-9]+'(, [a-z]+=(True|False))*\)"
_EXPRESSION = (
    rf"({_SYMBOL}|Pow\({_SYMBOL}, Integer\([0-9]\)\)|Integer\(-?[0-9]{{1,20}}\)"
    r"|Float\('-?[0-9.]{1,20}', precision=53\)|, |\)|true|false|(Add|And|CeilDiv|CeilToInt|CleanDiv|Equality"
    r"|FloatTrueDiv|FloorDiv|FloorToInt|GreaterThan|IntTrueDiv|LessThan|Max|Min|Mod|ModularIndexing|Mul|Not|Or"
    r"|PythonMod|RoundToInt|StrictGreaterThan|StrictLessThan|ToFloat|TruncToInt|Unequality|Where)\()*"
)
_TEXT = dict.fromkeys(("name", "as_name", "forward_arg_names"), r"\w*") | {"as_float": "-?Infinity|NaN"}
_TEXT |= {"target": _OPERATOR, "as_operator": _OPERATOR, "expr_str": _EXPRESSION}
_TEXT |= {"in_spec": _TREE, "out_spec": _TREE}
_TEXT |= {"as_string": "[ -~]*"}  # an argument, which torch quotes
_TEXT |= {"range_constraints": r"[\w+*/(), -]*"}  # its keys, which torch only compares
# Of no use to run a file: where its lines came from, and checks of inputs as Python code.
_DROPPED = {"metadata": {}, "guards_code": [], "torch_version": ""}


def checked_copy(path: str) -> io.BytesIO:
    """The pt2 file for torch.export.load, without its sample inputs.

    Raises:
        pickle.UnpicklingError: it holds more than tensors and a graph of torch's and torchvision's operators;
            nothing of it was run.
        Any error of zipfile, json or torch.load, where the file is damaged.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
        members = {member.filename.partition("/")[2]: member for member in source.infolist()}
        if len(members) < len(source.infolist()):
            raise pickle.UnpicklingError("two members of one name")
        for name, member in members.items():
            if not re.fullmatch(_MEMBERS, name) or member.compress_type != zipfile.ZIP_STORED:
                raise pickle.UnpicklingError(f"the member {name!r}")
            target.writestr(f"archive/{name}", _checked_member(name, source.read(member)))
    copy.seek(0)
    return copy


def _checked_member(name: str, content: bytes) -> bytes:
    if name.endswith(".pt") and name != _SAMPLES:
        try:
            found = torch.load(io.BytesIO(content), weights_only=True)
        except pickle.UnpicklingError as error:
            raise pickle.UnpicklingError(f"the objects in {name}") from error
        torch.save(found, file := io.BytesIO())  # as torch 2.8 would load the original without weights_only
        return file.getvalue()
    if name.endswith(".json") and not name.startswith("extra/"):
        return json.dumps(_checked(json.loads(content))).encode()
    return b"" if name == _SAMPLES else content


def _checked(value: Any, key: str = "") -> Any:
    """Of JSON at `key`, what may be loaded."""
    if isinstance(value, list):
        return [_checked(item, key) for item in value]
    if isinstance(value, dict):
        for name in value:
            _checked(name, key if key == "range_constraints" else "")
        fits = not value.get("use_pickle")
        value = {k: _DROPPED[k] if k in _DROPPED else _checked(v, k) for k, v in value.items()}
    else:
        fits = not isinstance(value, str) or re.fullmatch(_TEXT.get(key, r"[\w.]*"), value, re.ASCII)
        if fits and _TEXT.get(key) == _OPERATOR and value.startswith("torch.ops."):
            found = operator.attrgetter(value.removeprefix("torch."))(torch)
            fits = isinstance(found, type(torch.ops.aten.add.Tensor))
    if not fits:
        raise pickle.UnpicklingError(f"{key} {str(value)[:80]!r}")
    return value
