"""One Ray cluster for all tests that need one, and processes that need not import everything."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # toy_measure, also for tests one folder down
sys.path.append(str(Path(__file__).parent.parent / "benchmarks" / "anchors"))  # run, records


@pytest.fixture(scope="session")
def ray_session():
    """A local cluster; every RayPool of this process joins it and leaves it running."""
    import toy_measure

    from allocator.executors.ray_pool import import_ray

    ray = import_ray()
    ray.init(
        "local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
    )
    ray.cloudpickle.register_pickle_by_value(toy_measure)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def spawn(tmp_path_factory):
    """Starts ``allocator WORDS`` in a process forked from one that has imported everything."""
    from cli_runs import run_alone

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm_start"])
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS", "COLUMNS")}
    here = str(Path(__file__).parent)
    os.environ |= {"PYTHONPATH": here, "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
    nowhere = tmp_path_factory.mktemp("logs") / "log.txt"
    started = []

    def spawn(*words, log=nowhere, largest_file=None):
        arguments = ([str(word) for word in words], log, largest_file)
        process = context.Process(target=run_alone, args=arguments)
        process.start()
        started.append(process)
        return process

    yield spawn
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    for process in started:
        process.kill()
        process.join()
