"""Every shipped launch file, read by the programs that read them; the Slurm script under a scheduler of our own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from ranks import start

ROOT = Path(__file__).parent.parent
ACCELERATE = sorted((ROOT / "launch/accelerate").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "launch/deepspeed").glob("*.json"))


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.name)
def test_accelerate_reads_it_and_it_holds_no_surprise(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    tree = yaml.safe_load(path.read_text())
    assert str(config.distributed_type).rpartition(".")[2] == tree["distributed_type"]
    assert tree.get("mixed_precision", "no") == "no", "precision is training.precision's"
    assert not {"gradient_accumulation_steps", "fp16", "dynamo_config"} & set(tree)
    assert tree["num_processes"] % tree["num_machines"] == 0
    if tree["distributed_type"] == "DEEPSPEED":
        assert set(tree["deepspeed_config"]) <= {
            *("deepspeed_config_file", "zero3_init_flag", "deepspeed_multinode_launcher")
        }
        assert tree["deepspeed_config"]["zero3_init_flag"] is False
        assert (ROOT / tree["deepspeed_config"]["deepspeed_config_file"]) in DEEPSPEED
    assert path.read_text().startswith("# "), "a file opens with what it is for"


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.name)
def test_deepspeed_reads_it_and_it_holds_no_surprise(path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    from deepspeed.runtime.config import DeepSpeedConfig

    tree = json.loads(path.read_text())
    config = DeepSpeedConfig({**tree, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3})
    assert config.gradient_clipping == 0.0 and "gradient_clipping" in tree
    assert config.train_batch_size == 6, "nothing in the file speaks of batches"
    assert not config.bfloat16_config.enabled and not config.float16_config.enabled
    offload = config.zero_config.offload_optimizer
    assert (offload is not None) == ("offload" in path.name) and (offload is None or offload.device == "cpu")
    assert config.zero_config.offload_param is None
    assert config.zero_config.reduce_bucket_size == 50_000_000, "the default allocates 2 GB a backward pass"
    readme = (path.parent / "README.md").read_text()
    assert f"`{path.name}`" in readme
    keys = [*tree, *tree["zero_optimization"]]
    missing = [key for key in keys if f"{key}`" not in readme and key != "zero_optimization"]
    assert not missing, f"not explained in launch/deepspeed/README.md: {missing}"


def test_every_stage_has_a_file_and_a_test():
    from test_distributed import DEEPSPEED as TESTED

    assert sorted(TESTED) == sorted(path.stem for path in DEEPSPEED)
    assert {json.loads(path.read_text())["zero_optimization"]["stage"] for path in DEEPSPEED} == {0, 1, 2, 3}


SEEN = """
import os
from letit_dist.training.setup import create_accelerator
found = create_accelerator(several_phases=False)
print(found.num_processes, found.device.type, found.distributed_type.value, os.environ["ACCELERATE_USE_CPU"])
"""


@pytest.mark.parametrize("name", ["cpu", "one"])
def test_one_process(name, tmp_path):
    """cpu.yaml does not look for a GPU."""
    (tmp_path / "seen.py").write_text(SEEN)
    done = start(tmp_path / "seen.py", launch=f"launch/accelerate/{name}.yaml", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    device = "cuda" if name == "one" and torch.cuda.is_available() else "cpu"
    assert done.stdout.split()[-4:] == ["1", device, "NO", str(name == "cpu")]


def test_the_kubernetes_manifest_starts_what_is_there():
    job = yaml.safe_load((ROOT / "launch/kubernetes/pretrain.yaml").read_text())
    assert job["kind"] == "PyTorchJob"
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert sum(part["replicas"] for part in replicas.values()) == 2
    (container,) = replicas["Master"]["template"]["spec"]["containers"]
    assert container["name"] == "pytorch", "the operator looks for this name"
    words = container["command"][2].split()
    files = [word for word in words if word.endswith((".yaml", ".py"))]
    assert len(files) == 3 and all((ROOT / file).is_file() for file in files)
    machines = yaml.safe_load((ROOT / files[0]).read_text())
    assert machines["num_machines"] == 2
    assert machines["num_processes"] == 2 * container["resources"]["limits"]["nvidia.com/gpu"]
    assert subprocess.run(["bash", "-n", "-c", container["command"][2]]).returncode == 0


SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
pids=()
id=0
for place in $PLACES; do
  SLURM_PROCID=$id SLURM_NODEID=${place%:*} SLURM_LOCALID=${place#*:} "$@" &
  pids+=($!)
  id=$((id + 1))
done
echo "${pids[@]}" > "$PIDS"
highest=0
for pid in "${pids[@]}"; do
  wait $pid; code=$?
  (( code > highest )) && highest=$code
done
exit $highest
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = requeue ]; then echo "$2" >> "$REQUEUED"; else echo 127.0.0.1; fi
"""


@pytest.fixture
def cluster(tmp_path):
    """A scheduler's commands on the PATH, and the environment of a job of two tasks on CPUs."""
    commands = tmp_path / "commands"
    commands.mkdir()
    python = f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", python)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PIDS": str(tmp_path / "pids"),
        "REQUEUED": str(tmp_path / "requeued"),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_TASKS_PER_NODE": "2",
        "PLACES": "0:0 0:1",  # node and number there of each task
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }


def test_slurm_saves_and_requeues_and_the_same_job_continues(cluster, tmp_path, fruit_shards):
    def submit(fault):
        command = ["bash", "launch/slurm/train.sbatch", "tests/faulty_run.py", str(tmp_path / "run"), str(fruit_shards)]
        options = {"cwd": ROOT, "env": cluster, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*command, fault], **options)

    job = submit("slow")
    begun = time.monotonic()
    while not (tmp_path / "run/stats.jsonl").exists() or not (tmp_path / "run/stats.jsonl").read_text():
        assert job.poll() is None and time.monotonic() - begun < 120
        time.sleep(0.1)
    for pid in (tmp_path / "pids").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 75, out
    assert "of 128 images; the same command continues" in out and "requeued" in out
    assert (tmp_path / "requeued").read_text().split() == [cluster["SLURM_JOB_ID"]]
    job = submit("none")
    out, _ = job.communicate(timeout=180)
    assert job.returncode == 0, out
    assert "resumed at " in out and (tmp_path / "run/checkpoints/images-000000000128").is_dir()
    assert len((tmp_path / "requeued").read_text().split()) == 1


def test_slurm_tells_each_rank_how_many_are_on_its_node(cluster, tmp_path):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    # One write, whatever the other tasks write.
    (tmp_path / "seen.py").write_text(f"import os; os.write(1, (' '.join(map(os.getenv, {names})) + '\\n').encode())")
    places = {"SLURM_NTASKS": "5", "SLURM_TASKS_PER_NODE": "2(x2),1", "PLACES": "0:0 0:1 1:0 1:1 2:0"}
    command = ["bash", "launch/slurm/train.sbatch", str(tmp_path / "seen.py")]
    done = subprocess.run(command, cwd=ROOT, env={**cluster, **places}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 5 0 2", "1 5 1 2", "2 5 0 2", "3 5 1 2", "4 5 0 1"]


def test_slurm_does_not_requeue_a_mistake(cluster, tmp_path):
    command = [
        "bash",
        "launch/slurm/train.sbatch",
        "launch/pretrain.py",
        "nowhere.yaml",
        "--run",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no such file: nowhere.yaml" in done.stderr
    assert not (tmp_path / "requeued").exists()
    done = subprocess.run(command[:2], cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "error: no program: sbatch" in done.stderr


def pictures(folder, count):
    folder.mkdir()
    for number in range(count):
        Image.linear_gradient("L").rotate(number).resize((16, 16)).save(folder / f"{number:03d}.png")
    return folder


def test_slurm_requeues_an_evaluation_which_goes_on(cluster, tmp_path):
    pytest.importorskip("torch_fidelity")
    # As Slurm does it: the tasks of a job that is put back are ended.
    command = tmp_path / "commands/scontrol"
    command.write_text(SCONTROL.replace('>> "$REQUEUED"', '>> "$REQUEUED"; kill $(cat "$PIDS")'))
    a, b, out = pictures(tmp_path / "a", 12 * 16), pictures(tmp_path / "b", 16), tmp_path / "out"
    given = ["eval/fidelity.py", a, b, "--random-weights", "--layer", "64", "--metrics", "fid", "--out", out]

    def submit():
        options = {"cwd": ROOT, "env": cluster, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(["bash", "launch/slurm/eval.sbatch", *map(str, given)], **options)

    def finished():
        return sorted(path.name for path in out.glob(".features/*/[0-9]*.safetensors"))

    job = submit()
    begun = time.monotonic()
    while not finished():
        assert job.poll() is None and time.monotonic() - begun < 240
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=60)
    assert job.returncode != 0 and "requeued" in said and "Traceback" not in said
    assert (tmp_path / "requeued").read_text().split() == [cluster["SLURM_JOB_ID"]]
    assert 0 < len(finished()) < 13 and not (out / "fidelity.jsonl").exists()
    job = submit()
    said, _ = job.communicate(timeout=400)
    assert job.returncode == 0, said
    rows = [json.loads(line) for line in (out / "fidelity.jsonl").read_text().splitlines()]
    assert [row["counts"] for row in rows] == [[192, 16], [16, 16]] and not finished()
    assert len((tmp_path / "requeued").read_text().split()) == 1


def test_slurm_does_not_requeue_an_evaluation_of_nothing(cluster, tmp_path):
    command = ["bash", "launch/slurm/eval.sbatch", "eval/fidelity.py", "nowhere", "b", "--out", str(tmp_path / "out")]
    options = {"cwd": ROOT, "env": cluster, "capture_output": True, "text": True, "timeout": 240}
    done = subprocess.run(command, **options)
    assert done.returncode == 2 and "no such folder" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "requeued").exists()
    done = subprocess.run(command[:2], **options)
    assert done.returncode == 2 and "error: no program: sbatch launch/slurm/eval.sbatch" in done.stderr
