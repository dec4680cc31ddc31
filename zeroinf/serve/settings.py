"""Settings of a server: address, keys and limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from zeroinf.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The settings of `zeroinf serve` beside those of a run. Raises UsageError for what would be unsafe."""

    model_name: str
    """What clients call the model."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any that is free."""
    api_key: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    """Values of the Host header that are answered; empty: on loopback its names, elsewhere all."""
    state: Path | None = None
    """Folder of files and batches; without it there are none."""
    max_queue: int = 256
    """Interactive completions that may be under way at once."""
    max_body_bytes: int = 4 << 20
    max_file_bytes: int = 512 << 20
    max_state_bytes: int = 64 << 30
    heartbeat_s: float = 1.0
    """Longest silence towards a client whose answer is being made."""
    drain_s: float = 600.0
    """Longest wait for answers under way once the server shall stop."""

    def __post_init__(self) -> None:
        if not self.is_local and not self.api_key:
            raise UsageError(
                f"--host {self.host} lets other machines in, and there is no API key",
                hint="set ZEROINF_SERVE_API_KEY or --api-key-file, or keep to 127.0.0.1",
            )
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii() or " " in self.api_key):
            raise UsageError("the API key is empty, or has spaces or other than ASCII in it", hint="choose another")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def hosts(self) -> list[str]:
        """Values of the Host header that are answered."""
        if self.allowed_hosts:
            return list(self.allowed_hosts)
        return ["localhost", "127.0.0.1", "[::1]", self.host] if self.is_local else ["*"]
