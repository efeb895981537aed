"""What a bare GPU machine can say of headpool: `scripts/gpu_suite --help`. Each step runs in a process of its own."""
