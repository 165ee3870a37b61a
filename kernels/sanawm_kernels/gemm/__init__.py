"""Matrix products with fused epilogues: bf16, FP8 and NVFP4, through Triton or cuBLASLt."""
