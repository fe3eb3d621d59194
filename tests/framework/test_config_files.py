"""Config files and overrides: safe on both providers, and wrong ones end in one error message."""

from contextlib import contextmanager
from functools import reduce

import pytest
import yaml
from observe_structures import leaves
from providers import BUILTIN, detectron2_provider

from dfm_d2.errors import UserError
from dfm_d2.framework import _config_files, merge_config_file, merge_config_opts
from dfm_d2.framework._config_files import OPTIONAL_NUMBERS, unused_keys


@pytest.fixture(params=["builtin", pytest.param("detectron2", marks=pytest.mark.d2)])
def cfg(request):
    return (BUILTIN if request.param == "builtin" else detectron2_provider()).get_cfg()


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "config.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@contextmanager
def refused(said: str):
    """What is done inside raises an error whose message is one line that matches `said`."""
    with pytest.raises(UserError, match=said) as error:
        yield
    text = str(error.value)
    assert "\n" not in text and text.endswith((".", "?")), text


def nested(values: dict) -> str:
    """The YAML file that sets keys of full names."""
    content = {}
    for name, value in values.items():
        *sections, key = name.split(".")
        reduce(lambda node, section: node.setdefault(section, {}), sections, content)[key] = value
    return yaml.safe_dump(content)


def check_both(cfg, write, key: str, value, said: str, removed=None) -> None:
    """A file and the command line that set the key are refused alike."""
    with refused(f"config.yaml' sets {said}"):
        merge_config_file(cfg, write(nested({key: value})), removed)
    with refused(f"The command line sets {said}"):
        merge_config_opts(cfg, [key, str(value)], removed)


def test_a_good_file_and_its_bases(cfg, write):
    write("VERSION: 2\nSEED: 3\nSOLVER: {BASE_LR: 0.5, STEPS: [1, 2]}\n", "base.yaml")
    write("SOLVER: {MOMENTUM: 0.5}\n", "other.yaml")
    merge_config_file(cfg, write("_BASE_: [base.yaml, other.yaml]\nSOLVER: {BASE_LR: 0.25}\n"))
    assert (cfg.SEED, cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, cfg.SOLVER.STEPS) == (3, 0.25, 0.5, (1, 2))


def test_a_file_is_read_once_however_often_it_is_a_base(cfg, write, tmp_path, monkeypatch):
    """The second base that is on it wins over the first one, as in Detectron2."""
    (tmp_path / "link").symlink_to(tmp_path)
    write("SEED: 1\nOUTPUT_DIR: base\n", "base.yaml")
    write("_BASE_: base.yaml\nSEED: 2\nVERSION: 2\n", "left.yaml")
    write("_BASE_: link/base.yaml\nSOLVER: {MAX_ITER: 3}\nVERSION: 2\n", "right.yaml")
    wanted = cfg.clone()
    wanted.merge_from_list(["SEED", 1, "SOLVER.MAX_ITER", 3, "OUTPUT_DIR", "base"])
    loaded, load = [], _config_files._load
    monkeypatch.setattr(_config_files, "_load", lambda *args: loaded.append(args) or load(*args))
    merge_config_file(cfg, write("_BASE_: [left.yaml, right.yaml]\n"))
    assert cfg == wanted and len(loaded) == 4


def _whole_config(changes: dict) -> str:
    """What cfg.dump() writes under Detectron2: every key that it has, as YAML."""
    ours = leaves(yaml.safe_load(BUILTIN.get_cfg().dump()))
    return nested({**dict(ours), **unused_keys(), **changes})


def test_a_whole_config_of_detectron2(cfg, write, caplog):
    merge_config_file(cfg, write(_whole_config({"SOLVER.BASE_LR": 0.5})))
    assert cfg.SOLVER.BASE_LR == 0.5
    assert not caplog.records


def test_the_builtin_names_what_it_ignores(write, caplog):
    cfg, wanted = BUILTIN.get_cfg(), BUILTIN.get_cfg()
    write(_whole_config({"MODEL.MASK_ON": True}), "base.yaml")
    own = "DATALOADER: {ASPECT_RATIO_GROUPING: false}\nINPUT: {CROP: {SIZE: [1, 1]}}\n"
    path = write(f"_BASE_: base.yaml\n{own}")
    for _ in range(2):  # as a command that reads its config twice
        merge_config_file(cfg, path)
    assert cfg == wanted
    cfg.MODEL.MASK_ON = False  # a key that the config has is never ignored
    merge_config_file(cfg, path)
    assert cfg.MODEL.MASK_ON is True
    record, _ = caplog.records
    ignored = "DATALOADER.ASPECT_RATIO_GROUPING False, INPUT.CROP.SIZE [1, 1], MODEL.MASK_ON True"
    said = f"'{path}': the framework ignores {ignored}"
    assert record.levelname == "WARNING" and record.message == said


def test_what_would_be_another_model_needs_detectron2(write):
    for key, default, value in (("RES5_DILATION", 1, 2), ("DEFORM_ON_PER_STAGE", [False] * 4, [True] * 4)):
        cfg, name = BUILTIN.get_cfg(), f"MODEL.RESNETS.{key}"
        merge_config_file(cfg, write(nested({name: default})))
        merge_config_opts(cfg, [name, str(default)])
        check_both(cfg, write, name, value, f"{name} to .*, which needs Detectron2: leave it out")


REMOVED = dict.fromkeys(("MODEL.OTHER", "OTHER_KEY"), (..., "others have it"))
REMOVED["SOLVER.OLD"] = ((1, 2), "use SOLVER.STEPS")
REMOVED["MODEL.OLD"] = ({"RATE": 0.5, "INNER": {"WORD": ""}}, "nothing replaces it")


def test_removed_keys_at_their_former_default_load(cfg, write, caplog):
    before = cfg.dump()
    write("MODEL: {OLD: {RATE: 0.5, INNER: {WORD: ''}}}\nOTHER_KEY: 3\n", "base.yaml")
    path = write("_BASE_: base.yaml\nSOLVER: {OLD: [1, 2]}\nMODEL: {OTHER: {A: {B: x}, C: null}}\n")
    merge_config_file(cfg, path, REMOVED)
    merge_config_opts(cfg, ["SOLVER.OLD", "(1, 2)", "MODEL.OLD.RATE", "0.5"], REMOVED)
    for key in ("MODEL.OTHER.A.B", "OTHER_KEY"):
        with refused(f"The command line sets {key}, which is no key of this tool: others have it."):
            merge_config_opts(cfg, [key, "1"], REMOVED)
    assert cfg.dump() == before and not caplog.records


def test_removed_keys_at_another_value(cfg, write):
    for key, value, said in (
        ("SOLVER.OLD", [1, 3], r"SOLVER.OLD to .*1, 3.*, but this option was removed: use SOLVER.STEPS\.$"),
        ("SOLVER.OLD", None, "SOLVER.OLD to .*None.*, but this option was removed"),
        ("MODEL.OLD.INNER.WORD", "x", r"MODEL.OLD.INNER.WORD to 'x', but .* nothing replaces it\.$"),
        ("MODEL.OLD.NEVER", 1, "MODEL.OLD.NEVER to .*, but this option was removed"),
        ("SOLVER.OLDER", 1, "the unknown key SOLVER.OLDER"),
    ):
        check_both(cfg, write, key, value, said, REMOVED)


# By the type of a default, or of the items of one: values that a key with it cannot have.
UNFIT = {
    bool: (None, 1, "word", [True]),
    int: (None, 0.5, True, "word", [1]),
    float: (None, True, "word", [0.5]),
    str: (None, 1, ["word"]),
    **dict.fromkeys((list, tuple), (None, 1, "word")),
    type(None): (True, "word", [1]),
}
UNFIT_ITEMS = {int: ([None], ["word"], [1, [1]]), float: ([None], ["word"]), str: ([1], ["word", None])}


def test_no_key_takes_a_value_of_another_kind(cfg, write):
    """Every key, Detectron2's own too, from a file and from the command line."""
    for key, default in leaves(cfg):
        has_items = isinstance(default, (list, tuple)) and default
        items = UNFIT_ITEMS.get(type(default[0]), ()) if has_items else ()
        for value in (*UNFIT[type(default)], *items):
            check_both(cfg, write, key, value, f"{key} to .*: it must be ")


def test_none_is_taken_where_it_is_the_default_and_whole_numbers_become_floats(cfg, write):
    assert {key for key, default in leaves(cfg) if default is None} == set(OPTIONAL_NUMBERS)
    assert None not in unused_keys().values()
    for value, wanted in (("0.5", 0.5), ("None", None), ("1", 1.0), ("0.5", 0.5)):
        merge_config_opts(cfg, ["SOLVER.WEIGHT_DECAY_BIAS", value])
        assert cfg.SOLVER.WEIGHT_DECAY_BIAS == wanted
    merge_config_file(cfg, write("SOLVER: {BASE_LR: 1, GAMMA: 1e-1}\nMODEL: {PIXEL_STD: [1, 2.5, 3]}\n"))
    merge_config_opts(cfg, ["SOLVER.MOMENTUM", "0"])
    assert str([cfg.SOLVER.BASE_LR, cfg.SOLVER.GAMMA, cfg.SOLVER.MOMENTUM]) == "[1.0, 0.1, 0.0]"


PAYLOADS = {
    "apply": "SEED: !!python/object/apply:os.mkdir ['{marker}']",
    "system": "SEED: !!python/object/apply:os.system ['touch {marker}']",
    "new": "SEED: !!python/object/new:subprocess.Popen [[touch, '{marker}']]",
    "name": "OUTPUT_DIR: !!python/name:os.system",
    "eval key": "? !!python/object/apply:os.system ['touch {marker}']\n: 1",
}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_code_is_run(cfg, write, tmp_path, payload):
    """Neither of a file nor of its bases."""
    marker, before = tmp_path / "marker", cfg.dump()
    evil = write(PAYLOADS[payload].format(marker=marker) + "\n", "evil.yaml")
    middle = write("_BASE_: evil.yaml\nSEED: 1\n", "middle.yaml")
    for path in (evil, middle, write("_BASE_: [middle.yaml]\nSEED: 2\n", "top.yaml")):
        with refused("evil.yaml.*can run code"):
            merge_config_file(cfg, path)
        assert not marker.exists() and cfg.dump() == before


def test_the_builtin_node_and_overrides_run_no_code(cfg, write, tmp_path):
    marker, node = tmp_path / "marker", BUILTIN.get_cfg()
    path = write(PAYLOADS["system"].format(marker=marker))
    with refused("can run code"):
        node.merge_from_file(path)
    with pytest.raises(ValueError, match="allow_unsafe must be False"):
        node.merge_from_file(path, allow_unsafe=True)
    node.merge_from_file(write("SEED: 3\n", "good.yaml"), allow_unsafe=False)
    assert node.SEED == 3
    merge_config_opts(cfg, ["OUTPUT_DIR", f"__import__('os').system('touch {marker}')"])
    assert cfg.OUTPUT_DIR.startswith("__import__") and not marker.exists()


BAD_FILES = {
    "SOLVER: {BASE_LRR: 0.1}\n": r"' sets the unknown key SOLVER.BASE_LRR: did you mean SOLVER.BASE_LR\?$",
    **dict.fromkeys(("NOTHING: 1\n", "NOTHING: {}\n"), "unknown key NOTHING"),
    "DATALOADER: {ASPECT_RATIO: 1}\n": "unknown key DATALOADER.ASPECT_RATIO",
    "MODEL: {RPN: {NOTHING: 1}}\n": "unknown key MODEL.RPN",
    "SOLVER: {BASE_LR: fast}\n": "config.yaml' sets SOLVER.BASE_LR to 'fast': it must be a finite number",
    "SOLVER: {BASE_LR: .inf}\n": "sets SOLVER.BASE_LR to inf: it must be a finite number",
    "SOLVER: {STEPS: [.nan]}\n": "sets SOLVER.STEPS to .nan.: it must be a list of numbers",
    "MODEL: {PIXEL_STD: [a]}\n": "sets MODEL.PIXEL_STD to .*: it must be a list of numbers",
    "SOLVER: 3\n": "config.yaml' sets the section SOLVER to 3",
    "SOLVER:\n": "config.yaml' sets the section SOLVER to None",
    "SOLVER: {AMP: true}\n": "config.yaml' sets the section SOLVER.AMP to True",
    "SOLVER: {BASE_LR: [\n": "config.yaml' is not valid YAML .line",
    **dict.fromkeys(("", "- 1\n"), "config.yaml' holds no keys"),
    "SOLVER: {1: 2}\n": "config.yaml' sets the unknown key SOLVER.1",
    "VERSION: 1\n": "config.yaml' has VERSION 1: only 2",
    **dict.fromkeys(("_BASE_: config.yaml\n", "_BASE_: link/config.yaml\n"), "includes itself"),
    f"_BASE_: {'x' * 2000}\n": "^.{,500}cannot be opened .File name too long.: check the path",
    "_BASE_: list.yaml\n": "list.yaml' .the _BASE_ of .*config.yaml'. holds no keys",
    "_BASE_: scalar.yaml\nSOLVER: {BASE_LR: 0.1}\n": "scalar.yaml.*sets the section SOLVER to 3",
    "_BASE_: missing.yaml\n": "missing.yaml.* does not exist",
    "_BASE_: link\n": "link' .the _BASE_ of .* does not exist",
    "_BASE_: binary.yaml\n": "binary.yaml'.* is not",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_files(cfg, write, tmp_path, text):
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(bytes(range(128, 256)))
    write("- 1\n", "list.yaml")
    write("SOLVER: 3\n", "scalar.yaml")
    with refused(BAD_FILES[text]):
        merge_config_file(cfg, write(text))
    with refused("^Config file 'missing.yaml' does not exist"):
        merge_config_file(cfg, "missing.yaml")


BAD_OVERRIDES = {
    "SOLVER.BASE_LR 0.1 SEED": "pairs KEY VALUE.* the value of SEED is missing",
    "SOLVER.BASE_RL 0.1": r"unknown key SOLVER.BASE_RL: did you mean SOLVER.BASE_LR\?$",
    "SOLVER.BASE_LR.MORE 0.1": "unknown key SOLVER.BASE_LR.MORE",
    "_BASE_ x.yaml": "unknown key _BASE_",
    "SEED 1.5": "SEED to '1.5': it must be a whole number",
    "OUTPUT_DIR {[1]:2}": "OUTPUT_DIR to .*: it must be text",
    "SOLVER None": "sets the section SOLVER to 'None'",
    "SOLVER.AMP 1": "sets the section SOLVER.AMP to '1'",
}


def test_overrides(cfg):
    merge_config_opts(cfg, ["SOLVER.BASE_LR", "0.5", "DATASETS.TRAIN", "('a', 'b')", "OUTPUT_DIR", "here"])
    for nothing in ([], None):
        merge_config_opts(cfg, nothing)
    for words, said in BAD_OVERRIDES.items():
        with refused(said):
            merge_config_opts(cfg, words.split())
    assert (cfg.SOLVER.BASE_LR, cfg.DATASETS.TRAIN, cfg.OUTPUT_DIR) == (0.5, ("a", "b"), "here")
