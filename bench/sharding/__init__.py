"""``python -m bench sharding``: what slots over ranks promise, measured with processes of gloo on this machine."""
