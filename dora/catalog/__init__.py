"""Known devices, networks and models, cluster files that name them, and times scaled to them.

Start with `load_cluster(path)`, then `scale_to_cluster(profile, cluster)`; or with
`scenario(name)`, which brings a cluster and what to run on it.

devices.py      device, device_names: rows of devices.csv and devices_extra.csv as `Device`
networks.py     network, network_names, medium: rows of networks.csv as `Medium`
cluster.py      load_cluster: a TOML file with catalogue names as `Cluster`
roofline.py     roofline_s, scale_profile, scale_to_cluster: block times on an unmeasured device
models.py       model_profile, model_names: costs of well-known models, from their configuration
layers.py       what one layer costs; cnn.py and transformer.py put the models together
scenarios.py    scenario, scenario_names, cell_profile: scenarios/*.toml as cluster and cells
SOURCES.md      where the numbers come from, and which of them are estimates
"""

from dora.catalog.cluster import load_cluster
from dora.catalog.devices import device, device_names
from dora.catalog.models import model_names, model_profile
from dora.catalog.networks import Network, medium, network, network_names
from dora.catalog.roofline import roofline_s, scale_profile, scale_to_cluster
from dora.catalog.scenarios import Cell, Scenario, cell_profile, scenario, scenario_names

__all__ = [
    "Cell",
    "Network",
    "Scenario",
    "cell_profile",
    "device",
    "device_names",
    "load_cluster",
    "medium",
    "model_names",
    "model_profile",
    "network",
    "network_names",
    "roofline_s",
    "scale_profile",
    "scale_to_cluster",
    "scenario",
    "scenario_names",
]
