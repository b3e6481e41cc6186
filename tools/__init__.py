"""kvtier.tools"""
