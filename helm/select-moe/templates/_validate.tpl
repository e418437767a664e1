{{/* Mistakes that no schema can name; those that one can are in values.schema.json. Renders nothing, or ends the rendering. */}}
{{- define "select-moe.validate" -}}
{{- if ge (int .Values.hooks.waitSeconds) (int .Values.hooks.activeDeadlineSeconds) }}
{{- fail (printf "hooks.waitSeconds=%d must be less than hooks.activeDeadlineSeconds=%d, or a job is ended before it can say what it waits for" (int .Values.hooks.waitSeconds) (int .Values.hooks.activeDeadlineSeconds)) }}
{{- end }}
{{- range $name := keys .Values.commonLabels .Values.pipeline.profile.labels | sortAlpha }}
{{- if regexMatch "^(app\\.kubernetes\\.io/(name|instance|component|part-of|version|managed-by)|helm\\.sh/chart)$" $name }}
{{- fail (printf "commonLabels, pipeline.profile.labels: %s is the chart's own: Services and NetworkPolicies select by it" $name) }}
{{- end }}
{{- end }}
{{- $profile := .Values.pipeline.profile }}
{{- range $where, $map := dict "pipeline.profile.environment" $profile.environment "pipeline.profile.parameters" $profile.parameters "pipeline.run.parameters" .Values.pipeline.run.parameters }}
{{- range $name, $value := $map }}
{{- include "select-moe.noCredential" (dict "where" (printf "%s.%s" $where $name) "name" $name "value" (toJson $value) "instead" "name a Secret under pipeline.profile.secrets") }}
{{- end }}
{{- end }}
{{- range .Values.mlflow.extraEnv }}
{{- if hasKey . "value" }}
{{- include "select-moe.noCredential" (dict "where" (printf "mlflow.extraEnv %s" .name) "name" .name "value" .value "instead" "take it out of a Secret with valueFrom.secretKeyRef") }}
{{- end }}
{{- end }}
{{- range .Values.mlflow.extraArgs }}
{{- include "select-moe.noCredential" (dict "where" "mlflow.extraArgs" "name" . "value" . "instead" "set MLflow's own variable in mlflow.extraEnv with valueFrom.secretKeyRef") }}
{{- end }}
{{- range .Values.extraObjects }}
{{- if and (eq .kind "Secret") (or .data .stringData) }}
{{- fail (printf "extraObjects: Secret %s holds its data in the values, which Helm keeps with the release: make it outside the chart and name it" .metadata.name) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Ends the rendering if a plain value looks like a credential. Takes (dict "where" PLACE "name" NAME "value" TEXT "instead" ADVICE). */}}
{{- define "select-moe.noCredential" -}}
{{- if or (regexMatch "(?i)(password|passwd|secret|token|api_?key|access_?key|credential)" .name) (regexMatch "://[^/@\\s]*:[^/@\\s]*@" .value) }}
{{- fail (printf "%s looks like a credential: %s" .where .instead) }}
{{- end }}
{{- end }}
