# What one cluster needs before its jobs start. Copy to slurm/env/NAME.sh, then: CLUSTER=NAME sbatch slurm/train.sbatch ...
# The file is sourced by the batch script on the first node; what it exports reaches every process.

# module load python/3.11 cuda/13                # the site's modules, if Python or the driver come from there
# export PYTHON=/path/to/venv/bin/python         # an environment that every node can see
# export GLOO_SOCKET_IFNAME=eth0                 # the network between nodes, where the default one is wrong (CPU)
# export NCCL_SOCKET_IFNAME=ib0                  # the same for NCCL (GPU)
# export DLTRAIN_CACHE=/scratch/$USER/dltrain    # caches on a disk that every node can see
