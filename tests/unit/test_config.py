"""The configuration is strict: what is not understood is an error that names key, value and what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from meshwright import Plan, config
from meshwright.errors import ConfigError, PlanError
from meshwright.train.plans import resolve_plan


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_file_then_settings_then_ranks(tmp_path: Path) -> None:
    path = written(tmp_path, "seed: 3\ntrain: {steps: 7}\nplan: {depth: 4}\n")
    job = config.load(path, ["train.steps=9", "optim.lr=0.5", "data.images=null"], ranks=4)
    assert (job.seed, job.train.steps, job.plan.depth, job.ranks, job.optim.lr) == (3, 9, 4, 4, 0.5)
    assert job.data.images is None
    assert job.model == config.Config().model


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert config.load(written(tmp_path, "")) == config.Config()


def test_saving_and_loading_gives_the_same(tmp_path: Path) -> None:
    job = config.load(None, ["optim.lr=3", "data.classes=[a, b]", "ranks=2", "data.intensity=[1, 2.5]"])
    job = config.override(job, "augment.monai=[{name: A, b: [1, 2.5], c: null}, {name: D, e: true}]")
    assert config.load(written(tmp_path, job.yaml())) == job
    # nothing is left to the defaults of a later release
    assert set(yaml.safe_load(job.yaml())["train"]) == set(vars(job.train))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.stepz=3", ["unknown key train.stepz", "did you mean train.steps?"]),
        ("trian.steps=3", ["unknown key trian", "did you mean train?"]),
        ("train.zzzz=3", ["unknown key train.zzzz", "known here: steps"]),
        ("seed.deep=3", ["seed = {'deep': 3}", "expected a whole number"]),
        ("train.steps=many", ["train.steps = 'many' is text", "expected a whole number"]),
        ("train.steps=1.0", ["train.steps = 1.0 is a number", "expected a whole number"]),
        ("train.steps=true", ["train.steps = True is true or false", "expected a whole number"]),
        ("data.crop=1", ["data.crop = 1 is a whole number", "expected true or false"]),
        ("train.precision=fp8", ["train.precision = 'fp8'", "one of auto, bf16, fp32, fp64"]),
        ("optim.lr=1e-3", ["optim.lr = '1e-3'", "expected a number", "write 0.001"]),
        ("data.classes=[a, 3]", ["data.classes[1] = 3", "expected text"]),
        ("data.classes=abc", ["data.classes = 'abc'", "expected a list, each text"]),
        ("train=3", ["train must be a mapping", "3"]),
        ("train.steps=[", ["not YAML"]),
        ("train.steps", ["section.key=value"]),
        ("train.steps=0", ["train.steps = 0", "at least 1"]),
        ("data.memory_mib=0", ["data.memory_mib = 0", "at least 1"]),
        ("optim.lr=.inf", ["optim.lr = inf", "positive"]),
        ("optim.lr=.nan", ["optim.lr = nan", "positive"]),
        ("optim.clip_norm=-1", ["optim.clip_norm = -1.0", "0 or more"]),
        ("augment.monai=Flip", ["augment.monai = 'Flip' is text", "expected a list, each a mapping"]),
        ("augment.monai=[Flip]", ["augment.monai[0] = 'Flip' is text", "expected a mapping"]),
        ("augment.monai=[{name: Flip, 3: 4}]", ["augment.monai[0]: 3 = 4", "expected a name"]),
        ("augment.monai=[{name: Flip, at: {deep: 1}}]", ["augment.monai[0]: 'at' = {'deep': 1}", "a list of these"]),
        ("augment.monai=[{name: Flip, at: [[1]]}]", ["'at' = [[1]]", "a list of these"]),
        ("augment.monai=[{name: Flip, at: 2026-01-02}]", ["datetime.date(2026, 1, 2)", "a list of these"]),
    ],
)
def test_a_setting_that_is_not_understood_names_key_value_and_remedy(setting: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(None, [setting])
    for word in words:
        assert word in str(caught.value)


def test_a_file_that_is_not_understood_is_named(tmp_path: Path) -> None:
    for text, word in [("steps: 3", "unknown key steps"), ("[1]", "must be a mapping"), ("a: [", "not YAML")]:
        path = written(tmp_path, text)
        with pytest.raises(ConfigError, match=word) as caught:
            config.load(path)
        assert str(path) in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        config.load(tmp_path / "missing.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not YAML"):
        config.load(tmp_path / "binary")


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    path = written(tmp_path, "seed: !!python/object/apply:os.system ['touch hacked']")
    with pytest.raises(ConfigError, match="not YAML"):
        config.load(path)


def test_the_default_plan_puts_all_ranks_along_depth(tmp_path: Path) -> None:
    assert resolve_plan(config.load()) == Plan.uniform(depth=2)
    assert resolve_plan(config.load(ranks=4)) == Plan.uniform(depth=4)
    assert resolve_plan(config.load(ranks=1)) == Plan.uniform()
    assert resolve_plan(config.load(), started=8) == Plan.uniform(depth=8)
    square = config.load(None, ["plan.depth=2", "plan.height=2"])
    assert resolve_plan(square) == Plan.uniform(depth=2, height=2)
    Plan.uniform(width=3).save(tmp_path / "plan.yaml")
    assert resolve_plan(config.load(None, [f"plan.file={tmp_path / 'plan.yaml'}"])) == Plan.uniform(width=3)


def test_a_plan_that_does_not_match_the_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="needs 3 ranks, but 4 were asked for"):
        resolve_plan(config.load(None, ["plan.depth=3"], ranks=4))
    with pytest.raises(PlanError, match="needs 2 ranks, but 1 was started"):
        resolve_plan(config.load(None, ["plan.depth=2"]), started=1)
    Plan.uniform(width=3).save(tmp_path / "plan.yaml")
    both = config.load(None, [f"plan.file={tmp_path / 'plan.yaml'}", "plan.depth=3"])
    with pytest.raises(PlanError, match="both set"):
        resolve_plan(both)
