"""kvtier.tools.bench"""
