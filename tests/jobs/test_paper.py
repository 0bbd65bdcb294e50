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


def test_the_page_has_the_tables_as_they_are_written(config, tmp_path):
    rules.validate(config)
    paper.run(config, tmp_path / "out")
    written = (tmp_path / "out" / "paper.md").read_text()
    for table in written.split("\n\n"):
        assert table.strip() in (ROOT / "docs" / "reproduce.md").read_text()


def test_hours_are_flops_over_the_speed(config):
    stage = config.stages.rfm_dit
    assert paper.run_flops(stage) == pytest.approx(883e9 * 1024 * 100_080, rel=0.01)
    assert (config.utilisation, stage.steps) == (0.4, 100_080)
    (row,) = [line for line in paper.tables(config).splitlines() if line.startswith("| rfm_dit |")]
    h100 = row.split("|")[5]
    assert float(h100) == pytest.approx(paper.run_flops(stage) / (0.4 * 989e12) / 3600, abs=0.5)


def parsed(command, monkeypatch):
    """The config that a whole command line gives, and its workdir."""
    python, module, entry, file, *given = command.split()
    assert (python, module, entry) == ("python", "-m", "dinosae_jax.main")
    file = file.replace("--config=", f"--config={ROOT}/")
    arguments = ["run", file, *given]
    monkeypatch.setattr(sys, "argv", arguments)  # there the parser looks for overrides
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    values(arguments)
    return values.config, values.workdir


@pytest.mark.parametrize("name", config_file.RUNS)
def test_the_commands_make_the_configs_that_are_counted(config, name, monkeypatch):
    """A command as absl parses it gives the run's config, but for its name and weights."""
    given, workdir = parsed(config.commands[name], monkeypatch)
    assert workdir == f"runs/{name}"
    made, counted = given.to_dict(), config.stages[name].to_dict()
    for each in (made, counted):
        each["name"] = each["weights"] = ""
    assert made == counted


@pytest.mark.parametrize("row", range(len(config_file.NUMBERS)))
def test_every_measurement_parses_and_reads_a_run_of_the_table(config, row, monkeypatch):
    *_, run, command = config.numbers[row]
    given, workdir = parsed(command, monkeypatch)
    assert given.init_from == f"runs/{run}"
    assert run in config.chain
    assert workdir.startswith(f"runs/measure_{run}")
    rules.validate(given)


def test_every_measurement_has_its_own_folder(config):
    folders = [command.split("--workdir=")[1].split()[0] for *_, command in config.numbers]
    assert len(set(folders)) == len(folders)


def test_a_utilisation_outside_its_range_is_one_clear_line(config):
    changed = config.copy_and_resolve_references()
    changed.utilisation = 40.0
    with pytest.raises(ValueError, match=r"fraction of the peak in \(0, 1\]; got 40"):
        paper.tables(changed)
