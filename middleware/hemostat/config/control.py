"""The section `control` of the configuration."""

from __future__ import annotations

from pydantic import Field, model_validator

from hemostat.config.fields import ExistingFile, HostPort, Secret, Section, is_loopback, split_address

_CAPTURES = "on another machine than this one, captures travel with clients' tokens"


class ControlSettings(Section):
    """The way in which relays and control processes on different machines find and trust each other."""

    addresses: list[HostPort] = Field(default=[], max_length=16)
    """The addresses `host:port` of all control processes, for `hemostat relay`. A name stands for all of its
    addresses."""
    listen: HostPort | None = None
    """The address `host:port` that relays on other machines connect to. `hemostat control` needs it; `hemostat serve`
    listens there, too, if it is set."""
    token: Secret | None = None
    """The relay token, which is the same on both sides. Whoever has it gets the policy, and Hemostat accepts its
    reports of what clients got."""
    token_file: ExistingFile | None = None
    """A file that contains the token and nothing else, in place of `token`. It is read at the start and at SIGHUP."""
    ca: ExistingFile | None = None
    """A PEM file of the authority that signs the control processes' certificates, for relays. With none there is no
    TLS, and only loopback addresses are allowed."""
    cert: ExistingFile | None = None
    """A PEM file of the certificate of a control process, which names the host of `addresses`. With none there is no
    TLS, and only loopback addresses are allowed. It is read at the start and at SIGHUP."""
    key: ExistingFile | None = None
    """A PEM file of the certificate's key. It is read at the start and at SIGHUP."""

    @model_validator(mode="after")
    def _secured(self) -> ControlSettings:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key: set both, or none of them")
        if (self.addresses or self.listen) and self.token is None:
            raise ValueError("token: required with addresses or listen; the same text on both sides, or a token_file")
        far = next((address for address in self.addresses if not is_loopback(split_address(address)[0])), None)
        if far is not None and self.ca is None:
            raise ValueError(f"ca: required, as {far} is not loopback, and {_CAPTURES}; set the authority's PEM file")
        if self.listen is not None and not is_loopback(split_address(self.listen)[0]) and self.cert is None:
            raise ValueError(f"cert: required, as {self.listen} is not loopback, and {_CAPTURES}; set cert and key")
        return self
