"""An OLMoE checkpoint of the user's own, proved against its digest."""
