"""What stands for the Hessian in influence functions: one file for each idea."""
