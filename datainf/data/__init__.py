"""The study's datasets: each loader returns data by seed, from the hub, from a folder, or built in."""
