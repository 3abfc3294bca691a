"""What the benchmarks share: interleaved rounds, reports, engines, workloads, HTTP traffic."""
