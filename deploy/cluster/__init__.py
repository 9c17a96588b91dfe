"""The Ray cluster of a command: finds or starts, joins and leaves it. Runs in the driver.

docker/, launcher/, slurm/ and kuberay.py are for people: they start clusters elsewhere (docs/clusters.md).
"""
