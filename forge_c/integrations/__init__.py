"""Bridges to other libraries. A module imports its library, which is optional; `import forge_c` imports none.

forge_c.integrations.transformers: attention, norms, rotary positions and products of Hugging Face models on the CPU.
"""
