"""The C++ and CUDA sources built another way: under sanitizers, over an emulated GPU, by nvcc."""
