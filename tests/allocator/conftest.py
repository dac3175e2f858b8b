"""One Ray cluster for all tests that need one."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # toy_measure, also for tests one folder down


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
