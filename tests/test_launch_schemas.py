"""The cluster manifests of launch/ against the schemas that Kubeflow's and SkyPilot's packages carry.

Those packages are no dependency of charrnn's; .ci/run installs them into an environment of their own and runs this file
alone there (`pytest --noconftest tests/test_launch_schemas.py`).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"
KUBERNETES = (LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8")
SERVE = (LAUNCH / "serve" / "kubernetes.yaml").read_text(encoding="utf-8")
SKYPILOT = (LAUNCH / "skypilot.yaml").read_text(encoding="utf-8")


def model_named(name):
    kubeflow = pytest.importorskip("kubeflow.training.models")
    client = pytest.importorskip("kubernetes.client")
    return getattr(kubeflow, name, None) or getattr(client, name)


def faults(value, kind, path="."):
    """Where `value` is not what the published models make of `kind`: unknown fields, wrong types, missing ones."""
    if collection := re.fullmatch(r"list\[(.+)\]|dict\(str, (.+)\)", kind):
        if not isinstance(value, list if collection[1] else dict):
            return [f"{path} is no {kind}"]
        parts = enumerate(value) if collection[1] else value.items()
        return [f for key, part in parts for f in faults(part, collection[1] or collection[2], f"{path}/{key}")]
    if kind in ("str", "int", "bool", "float"):
        return [] if type(value).__name__ == kind else [f"{path} is {value!r}, no {kind}"]
    if kind == "object":  # a port's name or number, say
        return []
    model = model_named(kind)
    fields = {name: attribute for attribute, name in model.attribute_map.items()}
    if not isinstance(value, dict):
        return [f"{path} is no {kind}"]
    found = [f"{path}/{name} is unknown to {kind}" for name in value.keys() - fields.keys()]
    known = {name: part for name, part in value.items() if name in fields}
    try:
        model(**{fields[name]: part for name, part in known.items()})
    except ValueError as error:
        found.append(f"{path}: {error}")
    return found + [
        f for name, part in known.items() for f in faults(part, model.openapi_types[fields[name]], f"{path}/{name}")
    ]


MANIFESTS = {
    KUBERNETES: ("V1PersistentVolumeClaim", "KubeflowOrgV1PyTorchJob"),
    SERVE: ("V1Deployment", "V1Service", "V2HorizontalPodAutoscaler"),
}


@pytest.mark.parametrize(
    ("manifest", "right", "wrong"),
    [
        (KUBERNETES, "", ""),
        (KUBERNETES, "restartPolicy", "restartPolcy"),
        (KUBERNETES, "maxRestarts: 3", "maxRestarts: three"),
        (KUBERNETES, "terminationGracePeriodSeconds", "terminationGracePeriod"),
        (KUBERNETES, "mountPath: /checkpoints", "path: /checkpoints"),
        (KUBERNETES, "- name: pytorch\n", "- id: pytorch\n"),
        (SERVE, "", ""),
        (SERVE, "readinessProbe", "readyProbe"),
        (SERVE, "scaleTargetRef", "targetRef"),
        (SERVE, "maxReplicas: 8", "maxReplicas: x"),
    ],
)
def test_a_manifest_fits_the_schemas_and_a_fault_in_it_is_found(manifest, right, wrong):
    assert right in manifest
    documents = yaml.safe_load_all(manifest.replace(right, wrong) if right else manifest)
    found = [f for tree, kind in zip(documents, MANIFESTS[manifest], strict=True) for f in faults(tree, kind)]
    assert bool(found) == bool(right), found


def test_the_manifest_is_of_the_training_operator():
    _, job = yaml.safe_load_all(KUBERNETES)
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")


def read_by_skypilot(text, tmp_path):
    """SkyPilot's own reading of a task file, in a process whose home is empty: exit code, output."""
    pytest.importorskip("sky")
    (tmp_path / "task.yaml").write_text(text)
    program = (
        "import sky; task = sky.Task.from_yaml('task.yaml'); (mount,) = task.storage_mounts.values();"
        "(machine,) = task.resources; print(task.num_nodes, machine.use_spot, machine.accelerators, mount.mode.value)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("", ""),
        ("use_spot", "use_spots"),
        ("num_nodes: 1", "num_nodes: one"),
        ("MOUNT_CACHED", "MOUNT_CASHED"),
        ("setup:", "set:"),
    ],
)
def test_skypilot_reads_its_task_file_and_finds_a_fault_in_it(tmp_path, right, wrong):
    assert right in SKYPILOT
    code, output = read_by_skypilot(SKYPILOT.replace(right, wrong) if right else SKYPILOT, tmp_path)
    assert bool(code) == bool(right), output
    assert right or output.splitlines()[-1] == "1 True {'A100': 8} MOUNT_CACHED"
