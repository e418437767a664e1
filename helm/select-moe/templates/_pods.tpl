{{/* What the pods have in common. Every helper takes the root context unless it says otherwise. */}}

{{/* Pod Security "restricted", for the pod. */}}
{{- define "select-moe.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* Pod Security "restricted", for a container. */}}
{{- define "select-moe.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{/*
The labels of a pod. In a Kubeflow with several users the profile's namespace injects Istio's proxy, with which a Job
never ends, and whose init container Pod Security "restricted" refuses.
*/}}
{{- define "select-moe.podLabels" -}}
{{ include "select-moe.labels" . }}
{{- if .root.Values.kfp.multiUser }}
sidecar.istio.io/inject: "false"
{{- end }}
{{- end }}

{{/* Where a pod may run. Takes a mapping with nodeSelector, tolerations, affinity, topologySpreadConstraints, priorityClassName. */}}
{{- define "select-moe.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{/* Certificates of a site's own authority, for every client in the pod: S3, MLflow, PostgreSQL. */}}
{{- define "select-moe.caEnv" -}}
{{- if .Values.certificates.existingConfigMap.name -}}
{{- range list "AWS_CA_BUNDLE" "REQUESTS_CA_BUNDLE" "SSL_CERT_FILE" "PGSSLROOTCERT" }}
- name: {{ . }}
  value: /etc/certificates/ca.crt
{{- end }}
{{- end }}
{{- end }}

{{- define "select-moe.caMount" -}}
{{- if .Values.certificates.existingConfigMap.name -}}
- name: certificates
  mountPath: /etc/certificates
  readOnly: true
{{- end }}
{{- end }}

{{- define "select-moe.caVolume" -}}
{{- with .Values.certificates.existingConfigMap }}
{{- if .name -}}
- name: certificates
  configMap:
    name: {{ .name }}
    items:
      - key: {{ .key }}
        path: ca.crt
{{- end }}
{{- end }}
{{- end }}

{{/* An environment variable out of a Secret. Takes (dict "name" VARIABLE "secret" NAME "key" KEY). */}}
{{- define "select-moe.secretEnv" -}}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ .secret }}
      key: {{ .key }}
{{- end }}

{{/* The credentials of the bucket: variable to key of the Secret, as JSON; none where the cloud knows the service account. */}}
{{- define "select-moe.s3Keys" -}}
{{- $keys := .Values.objectStorage.existingSecret }}
{{- $all := dict "AWS_ACCESS_KEY_ID" $keys.accessKeyKey "AWS_SECRET_ACCESS_KEY" $keys.secretKeyKey }}
{{- ternary (dict) $all .Values.objectStorage.external.workloadIdentity | toJson }}
{{- end }}

{{/* What a client of the bucket needs. */}}
{{- define "select-moe.s3Env" -}}
{{- range $variable, $key := include "select-moe.s3Keys" . | fromJson }}
{{ include "select-moe.secretEnv" (dict "name" $variable "secret" (include "select-moe.s3Secret" $) "key" $key) }}
{{- end }}
- name: AWS_DEFAULT_REGION
  value: {{ .Values.objectStorage.region | quote }}
- name: AWS_ENDPOINT_URL_S3
  value: {{ include "select-moe.s3Endpoint" . | quote }}
- name: MLFLOW_S3_ENDPOINT_URL
  value: {{ include "select-moe.s3Endpoint" . | quote }}
{{- end }}

{{/* Where MLflow's own database is; user and password go to the driver by its own variables. */}}
{{- define "select-moe.mlflowDatabaseUri" -}}
{{- $database := .Values.mlflow.database }}
{{- if eq $database.type "sqlite" -}}
sqlite:////data/mlflow.db
{{- else -}}
{{- $postgresql := $database.postgresql }}
{{- printf "postgresql+psycopg://%s:%d/%s?sslmode=%s" $postgresql.host (int $postgresql.port) $postgresql.name $postgresql.sslMode }}
{{- end }}
{{- end }}

{{- define "select-moe.mlflowDatabaseEnv" -}}
- name: MLFLOW_BACKEND_STORE_URI
  value: {{ include "select-moe.mlflowDatabaseUri" . | quote }}
{{- if eq .Values.mlflow.database.type "postgresql" }}
{{- $secret := .Values.mlflow.database.postgresql.existingSecret }}
{{ include "select-moe.secretEnv" (dict "name" "PGUSER" "secret" $secret.name "key" $secret.userKey) }}
{{ include "select-moe.secretEnv" (dict "name" "PGPASSWORD" "secret" $secret.name "key" $secret.passwordKey) }}
{{- end }}
{{- end }}

{{/* What a client of MLflow needs. */}}
{{- define "select-moe.mlflowClientEnv" -}}
- name: MLFLOW_TRACKING_URI
  value: {{ include "select-moe.mlflowUrl" . | quote }}
{{- if .Values.mlflow.auth.enabled }}
- name: MLFLOW_TRACKING_USERNAME
  value: {{ .Values.mlflow.auth.username | quote }}
{{ include "select-moe.secretEnv" (dict "name" "MLFLOW_TRACKING_PASSWORD" "secret" (include "select-moe.mlflowAuthSecret" .) "key" .Values.mlflow.auth.existingSecret.passwordKey) }}
{{- end }}
{{- end }}

{{/* What a client of Kubeflow Pipelines reads the token from that the API server of a Kubeflow with several users asks for. */}}
{{- define "select-moe.kfpTokenVolume" -}}
- name: kfp-token
  projected:
    defaultMode: 0440
    sources:
      - serviceAccountToken:
          audience: pipelines.kubeflow.org
          expirationSeconds: 7200
          path: token
{{- end }}

{{- define "select-moe.kfpTokenMount" -}}
- name: kfp-token
  mountPath: /var/run/secrets/kubeflow/pipelines
  readOnly: true
{{- end }}

{{/* The words that name the API server, for the commands that talk to it. */}}
{{- define "select-moe.kfpArgs" -}}
- {{ printf "endpoint=%s" .Values.kfp.endpoint | quote }}
{{- if .Values.certificates.existingConfigMap.name }}
- ca_file=/etc/certificates/ca.crt
{{- end }}
{{- if .Values.kfp.multiUser }}
- {{ printf "namespace=%s" .Release.Namespace | quote }}
{{- end }}
{{- end }}

{{/*
The pod of one of the project's own commands (python -m pipelines.install ...). Takes a dict: root; component; args, env,
mounts, volumes as YAML lists; serviceAccount; token (whether it may talk to the Kubernetes API).
*/}}
{{- define "select-moe.taskPod" -}}
metadata:
  labels:
    {{- include "select-moe.podLabels" . | nindent 4 }}
spec:
  {{- include "select-moe.taskPodSpec" . | nindent 2 }}
{{- end }}

{{- define "select-moe.taskPodSpec" -}}
{{- $hooks := .root.Values.hooks -}}
restartPolicy: Never
serviceAccountName: {{ .serviceAccount }}
automountServiceAccountToken: {{ .token | default false }}
enableServiceLinks: false
{{- with include "select-moe.imagePullSecrets" .root }}
{{- . | nindent 0 }}
{{- end }}
securityContext:
  {{- include "select-moe.podSecurityContext" .root | nindent 2 }}
{{- with include "select-moe.scheduling" $hooks | trim }}
{{- . | nindent 0 }}
{{- end }}
containers:
  - name: {{ .component }}
    image: {{ include "select-moe.image" .root }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    command: [python, -m, pipelines.install]
    args:
      {{- .args | nindent 6 }}
    {{- with list (include "select-moe.caEnv" .root) .env | join "\n" | trim }}
    env:
      {{- . | nindent 6 }}
    {{- end }}
    securityContext:
      {{- include "select-moe.securityContext" .root | nindent 6 }}
    resources:
      {{- toYaml $hooks.resources | nindent 6 }}
    volumeMounts:
      - name: tmp
        mountPath: /tmp
      {{- with list (include "select-moe.caMount" .root) .mounts | join "\n" | trim }}
      {{- . | nindent 6 }}
      {{- end }}
volumes:
  - name: tmp
    emptyDir:
      sizeLimit: 1Gi
  {{- with list (include "select-moe.caVolume" .root) .volumes | join "\n" | trim }}
  {{- . | nindent 2 }}
  {{- end }}
{{- end }}

{{/*
How long and how often a Job is tried. Exit code 2 is a mistake in the values, which no second try mends; a pod that its
node lost is no failure. Takes (dict "root" $ "deadline" SECONDS).
*/}}
{{- define "select-moe.jobLimits" -}}
activeDeadlineSeconds: {{ .deadline }}
backoffLimit: {{ .root.Values.hooks.backoffLimit }}
ttlSecondsAfterFinished: {{ .root.Values.hooks.ttlSecondsAfterFinished }}
podFailurePolicy:
  rules:
    - action: FailJob
      onExitCodes:
        operator: In
        values: [2]
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
{{- end }}
