"""The tables of the papers' numbers: commands that parse, hours that follow from the FLOPs."""

import pathlib
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from configs import paper as config_file
from dinosae_jax import rules
from dinosae_jax.jobs import paper

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def config():
    return config_file.get_config()


def test_the_readme_holds_the_tables_as_they_are_written(config, tmp_path):
    rules.validate(config)
    paper.run(config, tmp_path / "out")
    written = (tmp_path / "out" / "paper.md").read_text()
    for table in written.split("\n\n"):
        assert table.strip() in (ROOT / "README.md").read_text()


def test_hours_are_flops_over_the_speed(config):
    stage = config.stages.rfm_dit
    assert paper.run_flops(stage) == pytest.approx(883e9 * 1024 * 100_080, rel=0.01)
    assert (config.utilisation, stage.steps) == (0.4, 100_080)
    (row,) = [line for line in paper.tables(config).splitlines() if line.startswith("| rfm_dit |")]
    h100 = row.split("|")[6]
    assert float(h100) == pytest.approx(paper.run_flops(stage) / (0.4 * 989e12) / 3600, abs=0.5)


@pytest.mark.parametrize("name", config_file.RUNS)
def test_the_commands_make_the_configs_that_are_counted(config, name, monkeypatch):
    """A command as absl parses it gives the run's config, but for its name and weights."""
    file, *given = config.commands[name].split()
    arguments = ["run", f"--config={ROOT / 'configs' / file}", *given]
    monkeypatch.setattr(sys, "argv", arguments)  # there the parser looks for overrides
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values)
    flags.DEFINE_string("workdir", f"runs/{file.removesuffix('.py')}", "", flag_values=values)
    values(arguments)
    made, counted = values.config.to_dict(), config.stages[name].to_dict()
    for each in (made, counted):
        each["name"] = each["weights"] = ""
    assert made == counted
    assert values.workdir == f"runs/{name}"


def test_every_number_names_a_run_and_a_config_that_exist(config):
    for _, _, _, run, command in config.numbers:
        assert run in config.chain
        assert (ROOT / "configs" / command.split()[0]).is_file()


def test_a_utilisation_outside_its_range_is_one_clear_line(config):
    changed = config.copy_and_resolve_references()
    changed.utilisation = 40.0
    with pytest.raises(ValueError, match=r"fraction of the peak in \(0, 1\]; got 40"):
        paper.tables(changed)
