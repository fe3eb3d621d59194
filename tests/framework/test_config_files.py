"""Config files and overrides: safe on both providers, and wrong ones end in one clear sentence."""

import pytest
import yaml
from observations import LATER_KEYS
from require_detectron2 import detectron2_provider

from dfm_d2.framework import _builtin, merge_config_file, merge_config_opts
from dfm_d2.framework._builtin.config import unused_keys


@pytest.fixture(params=["builtin", pytest.param("detectron2", marks=pytest.mark.d2)])
def cfg(request):
    provider = _builtin if request.param == "builtin" else detectron2_provider()
    return provider.get_cfg()


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "config.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def _sentence(error) -> str:
    """The message, which must be one line that ends with a full stop."""
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    return text


def test_a_good_file_and_its_bases(cfg, write):
    write("VERSION: 2\nSEED: 3\nSOLVER: {BASE_LR: 0.5, STEPS: [1, 2]}\n", "base.yaml")
    write("SOLVER: {MOMENTUM: 0.5}\n", "other.yaml")
    merge_config_file(cfg, write("_BASE_: [base.yaml, other.yaml]\nSOLVER: {BASE_LR: 0.25}\n"))
    assert (cfg.SEED, cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, cfg.SOLVER.STEPS) == (3, 0.25, 0.5, (1, 2))


def _whole_config(changes: dict, without=()) -> str:
    """What cfg.dump() writes under Detectron2: every key that it has, as YAML."""
    content = yaml.safe_load(_builtin.get_cfg().dump())
    for name, value in (unused_keys() | changes).items():
        if name in without:
            continue
        *sections, key = name.split(".")
        node = content
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return yaml.safe_dump(content)


def test_a_whole_config_of_detectron2(cfg, write, caplog):
    absent = () if isinstance(cfg, _builtin.CfgNode) else LATER_KEYS.keys() - cfg.keys()
    merge_config_file(cfg, write(_whole_config({"SOLVER.BASE_LR": 0.5}, without=absent)))
    assert cfg.SOLVER.BASE_LR == 0.5
    assert not caplog.records


def test_the_builtin_names_what_it_ignores(write, caplog):
    cfg, wanted = _builtin.get_cfg(), _builtin.get_cfg()
    write(_whole_config({"MODEL.MASK_ON": True}), "base.yaml")
    path = write(
        "_BASE_: base.yaml\nDATALOADER: {ASPECT_RATIO_GROUPING: false}\nINPUT: {CROP: {SIZE: [1, 1]}}\n"
    )
    for _ in range(2):  # as a command that reads its config twice
        merge_config_file(cfg, path)
    assert cfg == wanted
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "\n" not in record.message
    assert record.message == (
        f"'{path}': the builtin framework ignores DATALOADER.ASPECT_RATIO_GROUPING False, "
        "INPUT.CROP.SIZE [1, 1], MODEL.MASK_ON True"
    )


def test_a_key_is_never_ignored_where_the_config_has_it(write):
    cfg = _builtin.get_cfg()
    cfg.MODEL.MASK_ON = False
    merge_config_file(cfg, write("MODEL: {MASK_ON: true}\n"))
    assert cfg.MODEL.MASK_ON is True


PAYLOADS = {
    "apply": "SEED: !!python/object/apply:os.mkdir ['{marker}']",
    "system": "SEED: !!python/object/apply:os.system ['touch {marker}']",
    "new": "SEED: !!python/object/new:subprocess.Popen [[touch, '{marker}']]",
    "name": "OUTPUT_DIR: !!python/name:os.system",
    "eval key": "? !!python/object/apply:os.system ['touch {marker}']\n: 1",
}


@pytest.mark.parametrize("how", ["direct", "base", "base of base"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_code_is_run(cfg, write, tmp_path, payload, how):
    marker = tmp_path / "marker"
    path = write(PAYLOADS[payload].format(marker=marker) + "\n", "evil.yaml")
    if how != "direct":
        path = write("_BASE_: evil.yaml\nSEED: 1\n", "middle.yaml")
    if how == "base of base":
        path = write("_BASE_: [middle.yaml]\nSEED: 2\n", "top.yaml")
    before = cfg.dump()
    with pytest.raises(ValueError, match="evil.yaml.*can run code") as error:
        merge_config_file(cfg, path)
    _sentence(error)
    assert not marker.exists()
    assert cfg.dump() == before


@pytest.mark.parametrize("how", ["direct", "base"])
def test_the_node_itself_runs_no_code_when_asked_safely(cfg, write, tmp_path, how):
    """The call that merge_config_file rests on, without its own check before."""
    marker = tmp_path / "marker"
    path = write(PAYLOADS["system"].format(marker=marker), "evil.yaml")
    if how == "base":
        path = write("_BASE_: evil.yaml\n")
    with pytest.raises(Exception, match="could not determine a constructor"):
        cfg.merge_from_file(path, allow_unsafe=False)
    assert not marker.exists()


def test_the_builtin_node_is_safe_by_default(write, tmp_path):
    marker = tmp_path / "marker"
    path = write(PAYLOADS["system"].format(marker=marker))
    with pytest.raises(Exception, match="could not determine a constructor"):
        _builtin.get_cfg().merge_from_file(path)
    with pytest.raises(ValueError, match="allow_unsafe"):
        _builtin.get_cfg().merge_from_file(path, allow_unsafe=True)
    assert not marker.exists()


def test_overrides_run_no_code(cfg, tmp_path):
    marker = tmp_path / "marker"
    merge_config_opts(cfg, ["OUTPUT_DIR", f"__import__('os').system('touch {marker}')"])
    assert cfg.OUTPUT_DIR.startswith("__import__")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "SOLVER: {BASE_LRR: 0.1}\n",
            "config.yaml' sets the unknown key SOLVER.BASE_LRR: did you mean SOLVER.BASE_LR?",
        ),
        ("NOTHING: 1\n", "unknown key NOTHING"),
        ("NOTHING: {}\n", "unknown key NOTHING"),
        ("DATALOADER: {ASPECT_RATIO: 1}\n", "unknown key DATALOADER.ASPECT_RATIO"),
        ("MODEL: {RPN: {NOTHING: 1}}\n", "unknown key MODEL.RPN"),
        ("SOLVER: {BASE_LR: fast}\n", "config.yaml': .*SOLVER.BASE_LR"),
        ("SOLVER: 3\n", "config.yaml' sets the section SOLVER to 3"),
        ("SOLVER:\n", "config.yaml' sets the section SOLVER to None"),
        ("SOLVER: {AMP: true}\n", "config.yaml' sets the section SOLVER.AMP to True"),
        ("SOLVER: {BASE_LR: [\n", "config.yaml' is not valid YAML .line"),
        ("just words\n", "config.yaml' holds no keys"),
        ("", "config.yaml' holds no keys"),
        ("- 1\n", "config.yaml' holds no keys"),
        ("SOLVER: {1: 2}\n", "config.yaml' has the key 1"),
        ("_BASE_: config.yaml\n", "includes itself"),
        ("_BASE_: list.yaml\n", "list.yaml' .the _BASE_ of .*config.yaml'. holds no keys"),
        ("_BASE_: scalar.yaml\nSOLVER: {BASE_LR: 0.1}\n", "scalar.yaml.*sets the section SOLVER to 3"),
    ],
)
def test_bad_files(cfg, write, text, said):
    write("- 1\n", "list.yaml")
    write("SOLVER: 3\n", "scalar.yaml")
    with pytest.raises(ValueError, match=said) as error:
        merge_config_file(cfg, write(text))
    _sentence(error)


@pytest.mark.parametrize("base", [False, True])
def test_missing_file(cfg, write, tmp_path, base):
    missing = str(tmp_path / "missing.yaml")
    with pytest.raises(FileNotFoundError, match="missing.yaml.* does not exist") as error:
        merge_config_file(cfg, write("_BASE_: missing.yaml\n") if base else missing)
    _sentence(error)


def test_folder_and_binary_file(cfg, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        merge_config_file(cfg, str(tmp_path))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match="binary.yaml'.*not"):
        merge_config_file(cfg, str(binary))


def test_other_version(write):
    with pytest.raises(ValueError, match="VERSION 1"):
        merge_config_file(_builtin.get_cfg(), write("VERSION: 1\n"))


def test_good_overrides(cfg):
    merge_config_opts(cfg, ["SOLVER.BASE_LR", "0.5", "DATASETS.TRAIN", "('a', 'b')", "OUTPUT_DIR", "here"])
    assert (cfg.SOLVER.BASE_LR, cfg.DATASETS.TRAIN, cfg.OUTPUT_DIR) == (0.5, ("a", "b"), "here")
    merge_config_opts(cfg, [])
    merge_config_opts(cfg, None)


@pytest.mark.parametrize(
    ("opts", "said"),
    [
        (["SOLVER.BASE_LR"], "pairs KEY VALUE.*SOLVER.BASE_LR"),
        (["SOLVER.BASE_LR", "0.1", "SEED"], "pairs KEY VALUE"),
        (["SOLVER.BASE_RL", "0.1"], "Unknown config key SOLVER.BASE_RL: did you mean SOLVER.BASE_LR?"),
        (["SOLVER.BASE_LR.MORE", "0.1"], "Unknown config key SOLVER.BASE_LR.MORE"),
        (["_BASE_", "x.yaml"], "Unknown config key _BASE_"),
        (["SOLVER.BASE_LR", "fast"], "Config key SOLVER.BASE_LR cannot be 'fast'"),
        (["SEED", "1.5"], "Config key SEED cannot be '1.5'"),
        (["SOLVER", "None"], "SOLVER is a section"),
        (["SOLVER.AMP", "1"], "SOLVER.AMP is a section"),
    ],
)
def test_bad_overrides(cfg, opts, said):
    with pytest.raises(ValueError, match=said) as error:
        merge_config_opts(cfg, opts)
    assert "\n" not in str(error.value)
