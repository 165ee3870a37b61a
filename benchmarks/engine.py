"""Times of a CUDA bundle's stages on this machine's GPU: `python benchmarks/engine.py BUNDLE -o benchmarks/results/h200-engine.json`."""

from sanawm_export.cuda.cli import bench

if __name__ == "__main__":
    bench()
