"""One cluster for all tests that do no harm to it."""

import logging

import pytest

from tests.distributed.helpers import decomposed, embryo


def local_cluster(workers, **options):
    from distributed import LocalCluster

    return LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=True,
        dashboard_address="127.0.0.1:0",
        silence_logs=logging.CRITICAL,
        **options,
    )


@pytest.fixture(scope="session")
def client():
    """Two workers."""
    from distributed import Client

    with local_cluster(2) as cluster, Client(cluster) as client:
        yield client


@pytest.fixture(scope="session")
def genes():
    return embryo()


@pytest.fixture(scope="session")
def alone(genes):
    """What one process gives, without a client or a store."""
    return decomposed(genes)
