"""The Ray engine: the rows of one process on two nodes, with a node lost, and in one line where there is no cluster."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_tasks import CONVEX, token_task, vector_task

from tasks.errors import UserError
from tasks.training.engines import Executor, one_by_one
from tasks.training.plan import planned, random_subsets
from tasks.training.retrain import retrain, store_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]
HERE = Path(__file__).parent
PLAN = planned(random_subsets(24, 6, 0.5, 0), 2, "common", 0, 0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each on this machine; the first one also runs the cluster."""
    pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 10**8})
    made.add_node(num_cpus=1, object_store_memory=10**8)
    yield made
    import ray

    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def on_cluster(cluster: Any) -> Executor:
    return Executor("ray", None, cluster.address)


@pytest.mark.parametrize("kind", ["stacks", "single trainings"])
def test_two_nodes_make_the_rows_of_one_process(tmp_path: Path, on_cluster: Executor, kind: str) -> None:
    task = vector_task(epochs=2) if kind == "stacks" else token_task(24, epochs=2)
    assert on_cluster.stacks(task) == (kind == "stacks")
    found = retrain(task, PLAN, tmp_path, on_cluster)
    wanted = one_by_one(task, PLAN)
    for split in wanted:
        np.testing.assert_allclose(found[split], wanted[split], rtol=0, atol=1e-10)
    assert on_cluster.processes() == 2, "every CPU of the cluster"


def test_a_node_that_dies_costs_nothing_but_time(tmp_path: Path, cluster: Any, on_cluster: Executor) -> None:
    """A third node is taken away while it works; its units are made on the others."""
    task = token_task(24, epochs=150)
    node = cluster.add_node(num_cpus=1, object_store_memory=10**8)
    cluster.wait_for_nodes()
    told: list[int] = []

    def progress(done: int, of: int) -> None:
        told.append(done)
        if done == 2:
            cluster.remove_node(node, allow_graceful=False)

    found = retrain(task, PLAN, tmp_path, on_cluster, progress)
    assert 2 in told and told[-1] == 12
    wanted = one_by_one(task, PLAN)
    for split in wanted:
        np.testing.assert_allclose(found[split], wanted[split], rtol=0, atol=1e-10)


def test_a_training_that_raises_raises_as_itself(tmp_path: Path, on_cluster: Executor) -> None:
    task = vector_task(**{**CONVEX, "tolerance": 1e-300})
    with pytest.raises(ArithmeticError, match="no optimum"):
        retrain(task, PLAN, tmp_path, on_cluster)


def test_no_cluster_where_one_should_be_is_one_line(tmp_path: Path) -> None:
    """In a process of its own: this one is connected."""
    program = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
from small_tasks import vector_task
from tasks.errors import UserError
from tasks.training.engines import Executor
from tasks.training.plan import planned, random_subsets
from tasks.training.retrain import retrain
try:
    retrain(vector_task(), planned(random_subsets(24, 6, 0.5, 0), 1, "common", 0, 0), Path({str(tmp_path)!r}),
            Executor("ray", 1, "127.0.0.1:1"))
except UserError as error:
    print("one line:", error)
"""
    environment = {"PATH": "/usr/bin:/bin", "RAY_gcs_rpc_server_reconnect_timeout_s": "2", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert "one line: executor.address=127.0.0.1:1 answers no Ray cluster" in done.stdout, done.stdout + done.stderr
    assert not list(store_of(vector_task(), tmp_path).folder.glob("*.safetensors"))


def test_ray_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"executor\.engine=ray is not installed; pip install"):
        retrain(vector_task(), PLAN, tmp_path, Executor("ray", 1))


def test_an_address_belongs_to_ray() -> None:
    with pytest.raises(UserError, match=r"executor\.address=auto is Ray's"):
        Executor("vectorised", None, "auto")
