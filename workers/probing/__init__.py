"""What `workers.probe` is made of: limits of the host, timing, links, results and their cache."""
