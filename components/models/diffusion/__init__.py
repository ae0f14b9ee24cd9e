"""Stateless diffusion mathematics: schedules, objectives, samplers, guidance and degradations."""
