"""Chooses gloo's network interface: loopback on one machine, on several the interface that routes to the master."""

from __future__ import annotations

import fcntl
import socket
import struct

import torch

from engine.distributed.env import Env, gloo_interface, master_address, set_gloo_interface
from engine.errors import ConfigError, FieldError

_SIOCGIFADDR = 0x8915  # linux/sockios.h: an interface's IPv4 address


def choose_interface(env: Env, device: torch.device) -> None:
    """Set gloo's network interface, unless the user has: loopback on one machine, else the route to the master.

    By default, gloo binds to the address that the host's name resolves to. On many systems that is 127.0.1.1 (a line in
    /etc/hosts), which no other host can reach, or a network that the other hosts are not on. The route to MASTER_ADDR
    is known to work, because the store has just been reached over it. NCCL examines all interfaces itself.
    """
    if gloo_interface() is not None:
        return
    if env.local_world == env.world:
        set_gloo_interface("lo")
        return
    if device.type == "cuda":
        return
    master = master_address() or ""
    local = _address_towards(master)
    if local.startswith("127.") and master != "localhost" and not master.startswith("127."):
        problem = f"resolves to {local} on {socket.gethostname()} itself: other hosts cannot reach that address"
        fix = "Give torchrun an address that the other hosts can reach (--master-addr; --local-addr with c10d)."
        raise ConfigError([FieldError("distributed.master-on-loopback", "MASTER_ADDR", master, problem, fix)])
    if name := _interface_of(local):
        set_gloo_interface(name)


def _address_towards(host: str) -> str:
    """This host's IPv4 address on the route to `host`; empty if there is no route (gloo then uses its default)."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing: for a datagram socket the kernel only chooses the route
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _interface_of(address: str) -> str:
    """The network interface whose first IPv4 address is `address`; empty if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("40s", name.encode()))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""
