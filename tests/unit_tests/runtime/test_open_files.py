"""The limit of open files: raised, counted against, and needed less."""

import subprocess
import sys

import pytest

from megatron_mimo.runtime.open_files import check_limit, needed


def in_a_shell(limits: str, code: str) -> str:
    """What a program prints under other limits of open files."""
    command = f"{limits}; exec {sys.executable} -c '{code}'"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_limit_is_raised_as_far_as_allowed() -> None:
    code = (
        "import resource; from megatron_mimo.runtime.open_files import raise_limit; "
        "print(raise_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    assert in_a_shell("ulimit -Sn 200; ulimit -Hn 900", code) == "900 900 900"


def test_a_limit_that_is_too_low_is_refused_with_both_numbers_and_the_remedy() -> None:
    check_limit(800, 800, "rank 3")
    with pytest.raises(ValueError, match="up to 801 .* may open 800: .*ulimit -Hn 801"):
        check_limit(800, 801, "rank 3")


def test_lazily_connected_groups_hardly_grow_with_the_world() -> None:
    def of(world_size: int, *, lazily: bool) -> int:
        return needed([world_size] * 3, lazily=lazily)

    assert of(1024, lazily=False) - of(16, lazily=False) == 3 * 1008
    assert of(1024, lazily=True) - of(16, lazily=True) < 50
    assert needed([4], serves=1000) - needed([4]) > 1000


def test_a_mesh_has_a_socket_for_each_peer() -> None:
    assert needed([], meshes=[1024], lazily=True) - needed([], meshes=[16], lazily=True) == 1008


def test_groups_of_nccl_have_no_sockets_for_each_peer() -> None:
    hosts, device = [1024, 4], [1024] * 20
    over_gloo = needed([*hosts, *device], lazily=False)
    over_nccl = needed(hosts, communicators=len(device), lazily=False)
    assert over_gloo - over_nccl > 20 * 900
    assert over_nccl > needed(hosts, lazily=False)
