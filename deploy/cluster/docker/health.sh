#!/bin/sh
# The health check of both images. Runs in a container of its own user.
# usage: health.sh [FILE]   FILE: the command line of the container's first process [default: /proc/1/cmdline]
#
# A container that was started with `ray start --block` is healthy while the agent of its Ray node says that the node
# manager answers. The agent wants no token for this. A container of any other command, such as `ratchet train`, is
# healthy: its process ends when something is wrong. AGENT_PORT is for another --dashboard-agent-listen-port.
tr '\0' ' ' < "${1:-/proc/1/cmdline}" | grep -q 'ray start' || exit 0
wget -q --no-proxy -T 10 -O - "http://127.0.0.1:${AGENT_PORT:-52365}/api/local_raylet_healthz" | grep -q success
