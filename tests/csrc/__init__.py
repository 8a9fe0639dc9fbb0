"""The C++ and CUDA sources in special builds: with sanitizers, on an emulated GPU, with nvcc."""
