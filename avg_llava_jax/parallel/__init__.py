"""Many devices: meshes, placements, hosts, and what a run on them would take."""
