{{/* What only MLflow's own objects need. */}}

{{- define "select-moe.mlflowMounts" -}}
- name: tmp
  mountPath: /tmp
{{- with include "select-moe.caMount" . }}
{{ . }}
{{- end }}
{{- if eq .Values.mlflow.database.type "sqlite" }}
- name: data
  mountPath: /data
{{- end }}
{{- if .Values.mlflow.auth.enabled }}
- name: auth
  mountPath: /etc/select-moe
  readOnly: true
{{- end }}
{{- end }}

{{/* Several replicas on several nodes, where that can be and nothing else is said. */}}
{{- define "select-moe.mlflowSpread" -}}
{{- if and (gt (int .Values.mlflow.replicas) 1) (empty .Values.mlflow.topologySpreadConstraints) -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "select-moe.selector" (dict "root" . "component" "mlflow") | nindent 8 }}
{{- end }}
{{- end }}

{{/* Pages that may send requests from a browser: MLflow refuses every other origin, its own behind an Ingress too. */}}
{{- define "select-moe.mlflowOrigins" -}}
{{- $origins := .Values.mlflow.allowedOrigins }}
{{- with .Values.mlflow.ingress }}
{{- if .enabled }}
{{- $origins = prepend $origins (printf "%s://%s" (ternary "https" "http" (ne .tlsSecret "")) .host) }}
{{- end }}
{{- end }}
{{- join "," $origins }}
{{- end }}

{{/* Users live beside MLflow's own tables; nothing here is a credential. */}}
{{- define "select-moe.mlflowAuthIni" -}}
[mlflow]
default_permission = {{ .Values.mlflow.auth.defaultPermission }}
database_uri = {{ if eq .Values.mlflow.database.type "sqlite" }}sqlite:////data/basic_auth.db{{ else }}{{ include "select-moe.mlflowDatabaseUri" . }}{{ end }}
admin_username = {{ .Values.mlflow.auth.username }}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = {{ .Values.mlflow.auth.cacheSeconds }}
{{- end }}

{{- define "select-moe.mlflowAuthEnv" -}}
{{- $secret := include "select-moe.mlflowAuthSecret" . }}
{{- $keys := .Values.mlflow.auth.existingSecret }}
- name: MLFLOW_AUTH_CONFIG_PATH
  value: /etc/select-moe/auth.ini
- name: MLFLOW_AUTH_ADMIN_USERNAME
  value: {{ .Values.mlflow.auth.username | quote }}
{{ include "select-moe.secretEnv" (dict "name" "MLFLOW_AUTH_ADMIN_PASSWORD" "secret" $secret "key" $keys.passwordKey) }}
{{ include "select-moe.secretEnv" (dict "name" "MLFLOW_FLASK_SERVER_SECRET_KEY" "secret" $secret "key" $keys.flaskKey) }}
{{- end }}
