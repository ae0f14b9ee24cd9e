"""Stateless diffusion mathematics."""
