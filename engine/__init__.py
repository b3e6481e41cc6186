"""kvtier.engine"""
