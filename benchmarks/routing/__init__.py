"""A fleet of replicas in virtual time: what a way of choosing replicas costs in loads, waiting and unevenness."""
