"""The Dockerfile and the compose file: linted, and in step with the code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

HADOLINT = Path(sys.executable).parent / "hadolint"


def test_the_dockerfile_passes_hadolint(root: Path) -> None:
    # A development dependency: without it the test fails, for a skipped check is no check.
    done = subprocess.run([str(HADOLINT), str(root / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_runs_as_somebody_else_and_checks_its_health(root: Path) -> None:
    lines = (root / "Dockerfile").read_text(encoding="utf-8").splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users and users[-1].split(":")[0] not in ("root", "0")
    assert any(line.startswith("HEALTHCHECK ") for line in lines)
    assert "/health/live" in "\n".join(lines)


def test_compose_syncs_redis_at_every_write(root: Path) -> None:
    compose = yaml.safe_load((root / "deploy" / "compose.yaml").read_text(encoding="utf-8"))
    redis = compose["services"]["redis"]
    command = " ".join(redis["command"])
    assert "--appendonly yes" in command
    assert "--appendfsync always" in command
    assert redis["volumes"]
    for name, service in compose["services"].items():
        assert service["healthcheck"]["test"], name
    server = compose["services"]["server"]
    assert server["depends_on"]["redis"]["condition"] == "service_healthy"
    assert server["environment"]["MNEMOSYNE_REDIS_URL"].startswith("redis://redis:")
