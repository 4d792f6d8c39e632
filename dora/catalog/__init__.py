"""Known devices and networks, cluster files that name them, and times scaled to them.

Start with `load_cluster(path)`, then `scale_to_cluster(profile, cluster)`.

devices.py    device, device_names: rows of devices.csv and devices_extra.csv as `Device`
networks.py   network, network_names, medium: rows of networks.csv as `Medium`
cluster.py    load_cluster: a TOML file with catalogue names as `Cluster`
roofline.py   roofline_s, scale_profile, scale_to_cluster: block times on an unmeasured device
SOURCES.md    where the numbers come from, and which of them are estimates
"""

from dora.catalog.cluster import load_cluster
from dora.catalog.devices import device, device_names
from dora.catalog.networks import Network, medium, network, network_names
from dora.catalog.roofline import roofline_s, scale_profile, scale_to_cluster

__all__ = [
    "Network",
    "device",
    "device_names",
    "load_cluster",
    "medium",
    "network",
    "network_names",
    "roofline_s",
    "scale_profile",
    "scale_to_cluster",
]
